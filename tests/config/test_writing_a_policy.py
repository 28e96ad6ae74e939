"""The tutorial, done as it says: its files written, its commands run, its output compared."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llumsched

ROOT = Path(llumsched.__file__).parents[1]
TUTORIAL = ROOT / "docs" / "writing-a-policy.md"
FENCE = re.compile(
    r"<!-- (?:file: (?P<file>\S+)|(?P<run>run)) -->\n```\w+\n(?P<body>.*?)```", re.DOTALL
)


class Reader:
    """Someone who follows the page in a folder; `pip install` goes into a folder of theirs."""

    def __init__(self, folder: Path, site: Path) -> None:
        self.folder = folder
        self.site = site

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
        if tool == "llumsched":
            arguments = ["-m", "llumsched", *arguments]
        elif tool == "pip":
            # Offline, and not into the environment that runs the tests.
            offline = ["--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir"]
            arguments = ["-m", "pip", *arguments, *offline, "--target", str(self.site)]
        else:
            assert tool == "python"
        # Once installed, the policy must be found there and not in the folder.
        installed = any(self.site.iterdir())
        paths = [self.site, ROOT] if installed else [self.folder, ROOT]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTHONSAFEPATH": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PYTEST_ADDOPTS": "-p no:cacheprovider",
            "COLUMNS": "80",
        }
        finished = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, f"$ {command}\n{finished.stdout}{finished.stderr}"
        return finished.stdout


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    for name in ("sticky", "site"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / "docs" / "example-decisions.jsonl", tmp_path / "sticky")
    return Reader(tmp_path / "sticky", tmp_path / "site")


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
        "llumsched replay example-decisions.jsonl",
        "llumsched replay example-decisions.jsonl --config sticky.yaml --show 1",
    ]
    assert (reader.site / "sticky.py").is_file()
