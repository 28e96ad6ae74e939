"""Cores of a machine, each for one process: instances that compute on CPUs get in nobody's way.

vLLM binds the threads of an engine to cores by itself, but every engine to the same ones: it knows
of one. Here each process takes those that no other has taken. A core is taken by a lock on a file,
which the kernel undoes with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)


class OwnCores:
    """Cores that no other process has while this object lives.

    Args:
        num_cores: how many, of those that this process may run on.
        folder: where the locks are, the same for all processes of the machine.

    Attributes:
        cores: their numbers; empty if too few are free, or the folder cannot be used.
    """

    def __init__(self, num_cores: int, folder: Path | None = None) -> None:
        self._locks: list[IO[bytes]] = []
        self.cores: frozenset[int] = frozenset()
        if folder is None:
            folder = Path(tempfile.gettempdir()) / f"llumsched-cores-{os.getuid()}"
        found: set[int] = set()
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            # The first cores are those that most other things run on.
            for core in sorted(os.sched_getaffinity(0), reverse=True):
                if len(found) < num_cores and self._lock(folder / str(core)):
                    found.add(core)
        except OSError as error:  # no reason not to serve
            logger.warning("Runs on all cores: %s cannot be used: %s", folder, error)
        if len(found) < num_cores:
            self.release()
            return
        self.cores = frozenset(found)

    def _lock(self, path: Path) -> bool:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._locks.append(file)
        return True

    def bind(self) -> None:
        """Have every thread of this process run on them, and those that they start."""
        if not self.cores:
            return
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended, or may not be bound here
                os.sched_setaffinity(int(thread.name), self.cores)
        logger.info("Computes on cores %s alone", sorted(self.cores))

    def release(self) -> None:
        """Let others have them."""
        for file in self._locks:
            file.close()
        self._locks = []
        self.cores = frozenset()
