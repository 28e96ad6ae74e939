"""Work of processes, seen from outside: it tells one that hangs from one that is busy.

One that computes uses processor time, or waits for a processor or a disk; so do those that it waits
for, such as a compiler. One that hangs does neither, but nor does one that waits for a lock. This
module knows no instances.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

# States of a thread in Linux: running or ready to, and waiting for a disk.
_AT_WORK = frozenset("RD")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """``cpu_s`` is the processor time used so far, that of children it has waited for included;
    ``is_ready`` says whether a thread runs now, or would."""

    cpu_s: float
    is_ready: bool


def work_of(processes: Iterable[psutil.Process]) -> Work:
    """Work of these processes so far; those that are gone have done nothing."""
    cpu_s = 0.0
    is_ready = False
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            cpu_s += sum(times[:4])  # of itself and of its children, in user and kernel mode
            is_ready = is_ready or _is_ready(process)
    return Work(cpu_s=cpu_s, is_ready=is_ready)


def _is_ready(process: psutil.Process) -> bool:
    tasks = Path(f"/proc/{process.pid}/task")
    if not tasks.is_dir():
        return bool(process.status() == psutil.STATUS_RUNNING)
    for task in tasks.iterdir():
        with contextlib.suppress(OSError):  # the thread has ended
            # The name in parentheses may hold anything, also parentheses.
            if (task / "stat").read_text().rpartition(")")[2].split()[0] in _AT_WORK:
                return True
    return False
