"""`make vllm-diff`: what has moved in a release, from sources that are not installed."""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from llumsched.engine.vllm import version_check
from llumsched.engine.vllm.compat import installed_folder, installed_version
from llumsched.engine.vllm.internals import Internal
from llumsched.engine.vllm.sources import Sources
from scripts import vllm_diff

INTERNALS = (
    Internal("vllm.a", "kept", "test"),
    Internal("vllm.a", "changed", "test", ("x",)),
    Internal("vllm.a", "gone", "test"),
    Internal("vllm.a", "new", "test", since="0.33"),
)
OLD = "def kept(): ...\ndef changed(x): return x\ndef gone(): ...\n"
NEW = 'def kept():\n    """Kept."""\n    ...\ndef changed(x): return 2 * x\nnew = 1\n'


def write(folder: Path, version: str, text: str) -> Sources:
    package = folder / version / "vllm"
    package.mkdir(parents=True)
    (package / "_version.py").write_text(f"__version__ = {version!r}\n")
    (package / "a.py").write_text(text)
    return Sources(folder / version)


@pytest.fixture
def releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two releases, of which the older has a fingerprint; the folder of fingerprints."""
    found = {"0.32.0": write(tmp_path, "0.32.0", OLD), "0.33.0": write(tmp_path, "0.33.0", NEW)}
    monkeypatch.setattr(version_check, "INTERNALS", INTERNALS)
    monkeypatch.setattr(version_check, "own_imports", tuple)
    monkeypatch.setattr(vllm_diff, "sources_of", lambda version: found[version])
    fingerprints = tmp_path / "fingerprints"
    monkeypatch.setattr(vllm_diff, "FINGERPRINTS", fingerprints)
    vllm_diff.write_fingerprint("0.32.0", found["0.32.0"])
    return fingerprints


def test_what_moved_and_what_to_read(releases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vllm_diff.main(["0.33.0", "--show"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "vLLM 0.33.0: 1 of what is used is not there",
        "  vllm.a.gone (used to test)",
    ]
    assert "since 0.32.0: 3 of 3 bodies changed; read them" in lines
    assert "     2 lines  vllm.a.changed" in lines
    assert "        -    return x" in lines
    assert "        +    return 2 * x" in lines
    assert "     2 lines  vllm.a.gone (gone)" in lines
    assert "     1 lines  vllm.a.new (new)" in lines
    assert not any("vllm.a.kept" in line for line in lines)

    written = vllm_diff.read_fingerprint("0.33.0")
    assert sorted(written) == ["vllm.a.changed", "vllm.a.kept", "vllm.a.new"]
    assert written["vllm.a.kept"] == vllm_diff.read_fingerprint("0.32.0")["vllm.a.kept"]
    assert vllm_diff.fingerprinted_versions() == ["0.32.0", "0.33.0"]


def test_a_release_that_has_everything(releases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vllm_diff.main(["0.32.0"]) == 0
    assert "since" not in capsys.readouterr().out  # none is older


@pytest.mark.parametrize(
    ("version", "before"), [("0.33.0", "0.32.0"), ("0.100.0", "0.32.0"), ("0.32.0", None)]
)
def test_the_version_before(releases: Path, version: str, before: str | None) -> None:
    assert vllm_diff.version_before(version) == before


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Has `pip download` write a wheel; the commands that were run."""
    commands: list[list[str]] = []

    def run(command: list[str], *, check: bool) -> None:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "vllm-0.40.0-py3-none-any.whl", "w") as wheel:
            for name in ("vllm/a.py", "vllm/_C.so", "vllm-0.40.0.dist-info/METADATA"):
                wheel.writestr(name, OLD)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_only_the_sources_of_a_wheel_are_kept_and_downloaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip: list[list[str]]
) -> None:
    monkeypatch.setattr(vllm_diff, "default_cache_dir", lambda: tmp_path)
    for _ in range(2):
        assert vllm_diff.sources_of("0.40.0").find("vllm.a", "kept") is not None
    assert len(pip) == 1
    assert pip[0][-1] == "vllm==0.40.0"
    kept = [path for path in (tmp_path / "vllm").rglob("*") if path.is_file()]
    assert kept == [tmp_path / "vllm" / "0.40.0" / "vllm" / "a.py"]


def test_the_installed_version_is_not_downloaded(
    monkeypatch: pytest.MonkeyPatch, pip: list[list[str]]
) -> None:
    make: Callable[[str], Sources] = vllm_diff.sources_of
    assert make(installed_version()).folder == installed_folder()
    assert pip == []
