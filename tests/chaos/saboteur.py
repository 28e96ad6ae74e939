"""A policy that harms, when told, the instance that asks it: what no signal from outside can do."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llumsched.core.policy import MigrationCandidate
from tests.connections import shut_connections_to

# In the environment of the instances: the folder in which a file named by a process tells it.
FOLDER = "LLUMSCHED_CHAOS_FOLDER"
HANG, BREAK = "hang", "break"

CONFIG = """
policy: latency
parts:
  victim: tests.chaos.saboteur:Saboteur
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saboteur:
    """Any request may move. Asked on the loop of the engine, every half second."""

    def choose(self, candidates: Sequence[MigrationCandidate]) -> Sequence[MigrationCandidate]:
        told = Path(os.environ[FOLDER]) / str(os.getpid())
        if told.exists():
            what, *ports = told.read_text().split()
            told.unlink()
            if what == HANG:
                threading.Event().wait()
            shut_connections_to([int(port) for port in ports])
        return candidates


def tell(folder: Path, pid: int, what: str, *ports: int) -> None:
    """Have it done within the next half second."""
    unfinished = folder / f"{pid}.unfinished"
    unfinished.write_text(" ".join([what, *map(str, ports)]))
    unfinished.rename(folder / str(pid))
