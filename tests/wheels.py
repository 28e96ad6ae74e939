"""The wheel, built from a copy of the sources and installed as a user has it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import llumsched

ROOT = Path(llumsched.__file__).parents[1]
SOURCES = (
    "configs",
    "llumsched",
    "policies",
    "simulator",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)


def build_wheel(folder: Path) -> Path:
    """Build in a folder of its own: setuptools leaves its traces beside what it builds."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(path, source / name)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    (built,) = folder.glob("*.whl")
    return built


def pip(command: str, *arguments: str) -> None:
    """Run pip without an index: whatever is needed is here."""
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", command, *options, *arguments], check=True)
