"""Why an instance ended, as `status` and the log say it, and for how long they do."""

from __future__ import annotations

import os

import pytest
import ray

from llumsched.pool import ray_cluster
from llumsched.pool.backoff import FORGOTTEN_S, BackOff
from llumsched.pool.instance_actor import MAX_CAUSE_LENGTH, cause

SHORT_OF_MEMORY = (
    "Memory on the node (IP: 10.0.0.7, ID: 279c05) was 22.90GB / 24.00GB (0.954), which exceeds the"
    " memory usage threshold of 0.95. Ray killed this worker (ID: f45f) because it was the most"
    " recently scheduled task.\n"
    "Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/en/"
    "latest/ray-observability/user-guides/debug-apps/debug-memory.html. Consider provisioning more"
    " memory on this node or reducing task parallelism by requesting more CPUs per task."
)


def test_a_machine_short_of_memory_is_named_first() -> None:
    said = cause(ray.exceptions.OutOfMemoryError(SHORT_OF_MEMORY))
    assert said == (
        "out of memory: Ray ended it since its machine was nearly full, 22.90GB of 24.00GB in use"
    )


def test_words_of_ray_that_changed_still_name_the_cause() -> None:
    said = cause(ray.exceptions.OutOfMemoryError("anything"))
    assert said.startswith("out of memory: ")


def test_a_machine_that_died_is_named() -> None:
    assert cause(ray.exceptions.NodeDiedError("a paragraph")) == "its machine died"


def test_a_cause_is_a_line_that_a_table_can_hold() -> None:
    error = ValueError("first\n" + "No available memory for the cache blocks. " * 50)
    said = cause(error)
    assert said.startswith("No available memory for the cache blocks.")
    assert len(said) <= MAX_CAUSE_LENGTH + len(" ...")


def test_deaths_of_long_ago_are_forgotten() -> None:
    deaths = BackOff()
    deaths.died("out of memory", lived_s=5.0)
    deaths.lives(FORGOTTEN_S - 1)
    assert (deaths.num_deaths, deaths.last_failure) == (1, "out of memory")
    deaths.lives(FORGOTTEN_S)
    assert (deaths.num_deaths, deaths.last_failure) == (0, "")


@pytest.fixture
def started_with(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment in which a local Ray is started; the user has set one of the variables."""
    for name in ("RAY_ADDRESS", *ray_cluster.RAY_SETTINGS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_worker_niceness", "7")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(ray_cluster, "_latest_ray_start", lambda: None)
    found: dict[str, str] = {}
    monkeypatch.setattr(ray, "init", lambda **_: found.update(os.environ))
    before = dict(os.environ)
    ray_cluster.start_ray(None, num_cpus=2)
    for name in ray_cluster.RAY_SETTINGS.keys() - before.keys():
        del os.environ[name]
    return found


def test_ray_ends_no_healthy_instance_because_another_program_fills_the_machine(
    started_with: dict[str, str],
) -> None:
    assert started_with["RAY_memory_monitor_refresh_ms"] == "0"
    assert started_with["RAY_worker_oom_score_adjustment"] == "0"


def test_ray_does_nothing_that_nobody_uses(started_with: dict[str, str]) -> None:
    """No workers before they are asked for, and hardly any figures for a dashboard of no one."""
    assert started_with["RAY_prestart_worker_first_driver"] == "0"
    assert int(started_with["REPORTER_UPDATE_INTERVAL_MS"]) >= 60_000


def test_the_users_own_settings_of_ray_hold(started_with: dict[str, str]) -> None:
    assert started_with["RAY_worker_niceness"] == "7"
