"""The tutorial, done as it says: its files written, its commands run, its output compared."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.wheels import ROOT, pip

TUTORIAL = ROOT / "docs" / "writing-a-policy.md"
FENCE = re.compile(
    r"<!-- (?:file: (?P<file>\S+)|(?P<run>run)) -->\n```\w+\n(?P<body>.*?)```", re.DOTALL
)


class Reader:
    """Someone who follows the page in a folder, with the wheel installed as by pip.

    Their environment is a folder of packages: `llumsched` is the console script in it, so the
    current folder is on no path but where Python or pytest put it there, and nothing of the
    checkout is. Whatever else llumsched and the page need, the environment of the tests has.
    """

    def __init__(self, folder: Path, site: Path, wheel: Path) -> None:
        self.folder = folder
        self.site = site
        pip("install", "--target", str(site), str(wheel))

    def follow(self, page: str) -> list[str]:
        done = []
        for step in FENCE.finditer(page):
            if step["file"]:
                (self.folder / step["file"]).write_text(step["body"])
                done.append(step["file"])
                continue
            for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", step["body"], re.M):
                printed = self.run(command)
                pattern = re.escape(shown).replace(re.escape("..."), ".*?")
                assert re.fullmatch(pattern, printed, re.DOTALL), f"$ {command}\n{printed}"
                done.append(command)
        return done

    def run(self, command: str) -> str:
        tool, *arguments = command.split()
        program = [sys.executable]
        if tool == "llumsched":
            program.append(str(self.site / "bin" / "llumsched"))
        elif tool == "pip":
            # Offline, and not into the environment that runs the tests.
            offline = ["--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir"]
            arguments = ["-m", "pip", *arguments, *offline, "--target", str(self.site)]
        else:
            assert tool == "python"
        finished = subprocess.run(
            [*program, *arguments],
            cwd=self.folder,
            env=clean_environment(self.site),
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, f"$ {command}\n{finished.stdout}{finished.stderr}"
        return finished.stdout


def clean_environment(site: Path) -> dict[str, str]:
    """The environment of a fresh terminal, and the packages of `site`."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "PATH") if name in os.environ}
    return kept | {
        "PYTHONPATH": str(site),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PYTEST_ADDOPTS": "-p no:cacheprovider",
        "COLUMNS": "80",
    }


@pytest.fixture
def reader(tmp_path: Path, wheel: Path) -> Reader:
    for name in ("sticky", "site"):
        (tmp_path / name).mkdir()
    return Reader(tmp_path / "sticky", tmp_path / "site", wheel)


def test_the_tutorial_works_from_nothing_to_a_compared_policy(reader: Reader) -> None:
    done = reader.follow(TUTORIAL.read_text(encoding="utf-8"))
    assert done == [
        "sticky.py",
        "llumsched policies sticky:Sticky",
        "test_sticky.py",
        "python -m pytest -q test_sticky.py",
        "pyproject.toml",
        "pip install --quiet .",
        "llumsched policies sticky",
        "sticky.yaml",
        "llumsched config check sticky.yaml",
        "llumsched simulate example --hardware rtx4090-llama-3.1-8b --compare round_robin,sticky",
        "llumsched simulate example --policy latency --decision-log --out run",
        "llumsched replay run",
        "llumsched replay run --config sticky.yaml --show 1",
        "relieve.py",
        "relieve.yaml",
        "llumsched simulate S-L --rate 1.2 --requests 600 --compare round_robin,relieve.yaml",
    ]
    assert (reader.site / "sticky.py").is_file()


def test_without_its_file_the_error_says_where_it_was_looked_for(reader: Reader) -> None:
    with pytest.raises(AssertionError, match="its file in the current folder"):
        reader.run("llumsched policies sticky:Sticky")
