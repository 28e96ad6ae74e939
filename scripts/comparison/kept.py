"""Finished simulations of the comparison, kept so that a run which was cut short goes on.

A result is kept under a hash of what was simulated and of all code that a simulation uses: after a
change of either it is made again. Files are written whole or not at all, so that several processes
may share a folder. This module does not know what a run is.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
CODE = ("llumsched/core", "policies", "simulator", "configs/hardware")
"""Folders that decide what a simulation gives; and `workloads.py`."""


class Kept:
    """A folder of results; None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, what: str, make: Callable[[], T]) -> T:
        """The result that is kept of `what`; else `make` gives it, and it is kept."""
        if self._folder is None:
            return make()
        key = hashlib.sha256(f"{_code()} {what}".encode()).hexdigest()[:32]
        path = self._folder / f"{key}.pickle"
        if path.exists():
            found: T = pickle.loads(path.read_bytes())
            return found
        made = make()
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(pickle.dumps(made))
        part.rename(path)
        return made


@cache
def _code() -> str:
    digest = hashlib.sha256()
    files = [Path(__file__).with_name("workloads.py")]
    for folder in CODE:
        files += sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".yaml"))
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()
