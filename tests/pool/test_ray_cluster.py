"""Which Ray cluster a pool attaches to, and what it says of one that it cannot use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from llumsched.pool import ray_cluster
from llumsched.pool.ray_cluster import LaunchError, start_ray

# As Ray 2.60 says it.
MISMATCH = (
    "Version mismatch: The cluster was started with:\n    Ray: 2.55.0\n    Python: 3.11.7\n"
    "This process on 10.0.0.1 was started with:\n    Ray: 2.60.0\n    Python: 3.11.9\n"
)


@pytest.fixture
def inits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The addresses that Ray was told to attach to; all but a local one are of another version."""
    addresses: list[str] = []

    def init(*, address: str, **_: Any) -> None:
        addresses.append(address)
        if address != "local":
            raise RuntimeError(MISMATCH)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    for name, value in ray_cluster.RAY_SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a token")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return addresses


@pytest.mark.parametrize("is_flag", [True, False])
def test_a_cluster_of_another_version_is_named_with_both_versions(
    inits: list[str], monkeypatch: pytest.MonkeyPatch, is_flag: bool
) -> None:
    if not is_flag:
        monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(LaunchError) as refused:
        start_ray("head:6379" if is_flag else None, num_cpus=1)
    assert str(refused.value) == (
        "The Ray cluster at head:6379 is not of the same versions as this Ray (cluster: Ray 2.55.0,"
        " Python 3.11.7; here: Ray 2.60.0, Python 3.11.9). Install those of the cluster here, or"
        " leave --ray-address and RAY_ADDRESS out to have a local one started."
    )
    assert inits == ["head:6379"]


def test_one_that_nobody_named_is_left_for_a_local_one(
    inits: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The last `ray start` of this machine may have been of another environment."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379\n")
    with caplog.at_level("WARNING", ray_cluster.__name__):
        assert start_ray(None, num_cpus=1)
    assert inits == ["10.0.0.1:6379", "local"]
    assert "10.0.0.1:6379, is of other versions (cluster: Ray 2.55.0" in caplog.text


def test_other_errors_of_ray_are_not_taken_for_it(
    inits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RuntimeError, match="something else"):
        start_ray("head:6379", num_cpus=1)
