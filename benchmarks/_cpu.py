"""Processor time of a server's processes, by the part of the server that has used it.

Threads are told apart by their names, which libraries set: an actor of ours is a process of Ray's,
with threads of Ray's and of torch's beside ours. What a thread has used that has ended is not
counted.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import psutil

FRONTENDS = "frontends"
LAUNCHER = "launcher"
SCHEDULER = "scheduler"
INSTANCES = "instances"
ENGINE = "engine"
GLOO = "gloo, in engines"
RAY_WITHIN = "Ray, in these processes"
RAY = "Ray, its own processes"

OURS = (FRONTENDS, LAUNCHER, SCHEDULER, INSTANCES)
PARTS = (*OURS, ENGINE, GLOO, RAY_WITHIN, RAY)

# The beginnings of the names of Ray's threads.
_RAY_THREADS = (
    "client.poll",
    "event_engine",
    "gcs_client",
    "grpc_global_tim",
    "nexting_thread",
    "server.poll",
    "task_event_buff",
    "timer_manager",
    "worker.io",
)
_NS_PER_S = 1e9


def used_s(root: int) -> Mapping[str, float]:
    """Seconds that the processes from this one down have used so far, by part; 0 of any other.

    Args:
        root: the process id of a server, plain vLLM's or ours.
    """
    found: defaultdict[str, float] = defaultdict(float)
    first = psutil.Process(root)
    is_ours = "llumsched" in first.cmdline()
    for process in (first, *first.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            part = _part(process, root, is_ours)
            for thread in Path(f"/proc/{process.pid}/task").iterdir():
                with contextlib.suppress(OSError):  # it has ended
                    name = (thread / "comm").read_text().strip()
                    seconds = int((thread / "schedstat").read_text().split()[0]) / _NS_PER_S
                    is_actors_first = thread.name == str(process.pid) and part != LAUNCHER
                    found[_owner(part, name, is_actors_first and is_ours)] += seconds
    return found


def _part(process: psutil.Process, root: int, is_ours: bool) -> str:
    if not is_ours:
        # The root is the server, and what it has started computes.
        return FRONTENDS if process.pid == root else ENGINE
    if process.pid == root:
        return LAUNCHER
    if "llumsched.frontend.workers" in process.cmdline():
        return FRONTENDS
    name = process.name()
    if name.startswith("ray::Scheduler"):
        return SCHEDULER
    return INSTANCES if name.startswith("ray::Instance") else RAY


def _owner(part: str, thread: str, is_actors_first: bool) -> str:
    if part in (RAY, FRONTENDS):
        return part
    if thread.startswith("gloo_"):
        return GLOO
    # An actor's first thread is Ray's: it looks for signals a hundred times a second.
    return RAY_WITHIN if is_actors_first or thread.startswith(_RAY_THREADS) else part
