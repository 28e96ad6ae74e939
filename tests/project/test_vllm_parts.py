"""`make vllm-parts`: tests of the parts of a vLLM that is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llumsched.engine.vllm.sources import Sources
from scripts import vllm_parts


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sources of a release, of which only the package itself is there."""
    package = tmp_path / "0.39.0" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("version = '0.39.0'\n")
    monkeypatch.setattr(vllm_parts, "sources_of", lambda version: Sources(tmp_path / version))
    return tmp_path


def test_another_vllm_is_put_ahead_of_the_installed_one(release: Path) -> None:
    ahead = release / "ahead"
    ahead.mkdir()
    vllm_parts.put_ahead(ahead, "0.39.0")
    program = (
        "import vllm; from importlib.metadata import version as v; print(vllm.version, v('vllm'))"
    )
    said = subprocess.check_output(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(ahead)}, text=True
    )
    assert said.split() == ["0.39.0", "0.39.0+cpu"]


def test_the_tests_of_parts_are_there() -> None:
    assert all((vllm_parts.ROOT / name).is_file() for name in vllm_parts.PARTS)


def test_pytest_is_told_where_it_is(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[list[str], str]] = []

    def run(command: list[str], *, env: dict[str, str], **_: object) -> object:
        ran.append((command, env["PYTHONPATH"]))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    assert vllm_parts.main(["0.39.0", "--", "-x"]) == 3
    ((command, path),) = ran
    assert command[-1] == "-x"
    assert path.split(":")[1] == str(vllm_parts.ROOT)
