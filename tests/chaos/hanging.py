"""A policy that can be made to hang, and with it the loop of the engine that asks it."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llumsched.core.policy import MigrationCandidate

# In the environment of the instances: the folder in which a file named by its process tells one.
FOLDER = "LLUMSCHED_CHAOS_FOLDER"

CONFIG = """
policy: latency
parts:
  victim: tests.chaos.hanging:HangsWhenTold
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class HangsWhenTold:
    """Any request may move; once told, no answer ever comes."""

    def choose(self, candidates: Sequence[MigrationCandidate]) -> Sequence[MigrationCandidate]:
        if (Path(os.environ[FOLDER]) / str(os.getpid())).exists():
            threading.Event().wait()
        return candidates


def tell(folder: Path, pid: int) -> None:
    """Have the engine's loop of a process hang, within the next half second."""
    (folder / str(pid)).touch()
