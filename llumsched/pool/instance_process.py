"""The process of an instance as its supervisor sees it: on this machine, or on another.

Nothing here waits. Of a process on another machine, what is told is the latest answer of a
`NodeWatch` there. Without one that is fresh nothing is known, and a process of which nothing is
known is taken for one that works: what goes wrong between two machines is not a reason to kill.
"""

from __future__ import annotations

import contextlib
import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llumsched.pool.process_activity import Work, work_of

LOOK_INTERVAL_S = 0.2
# An older answer says nothing of now.
FRESH_S = 0.6
UNKNOWN = Work(cpu_s=math.inf, is_ready=True)


class InstanceProcess(Protocol):
    """A process that was started to be an instance; see ``liveness.Watched``."""

    pid: int

    def is_stopped(self) -> bool: ...

    def work(self) -> Work: ...

    def has_descendants(self) -> bool: ...

    def descendants_work(self) -> Work: ...

    def kill(self) -> None:
        """End it at once, also one that is stopped."""


class LocalProcess:
    """One of this machine.

    Raises:
        psutil.NoSuchProcess: if there is none.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._process = psutil.Process(pid)

    def is_stopped(self) -> bool:
        try:
            return bool(self._process.status() == psutil.STATUS_STOPPED)
        except psutil.NoSuchProcess:
            return False  # Ray will say so, and why

    def work(self) -> Work:
        return work_of([self._process])

    def has_descendants(self) -> bool:
        return bool(self._descendants())

    def descendants_work(self) -> Work:
        return work_of(self._descendants())

    def _descendants(self) -> list[psutil.Process]:
        try:
            return self._process.children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self._process.kill()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSample:
    """Observation of a process. ``descendants`` is None if they were not looked for, which takes
    a while, and a work of nothing if there are none."""

    is_stopped: bool
    work: Work
    has_descendants: bool = True
    descendants: Work | None = None


class NodeWatch:
    """A Ray actor that looks at processes of its machine, and ends them."""

    def __init__(self) -> None:
        self._processes: dict[int, LocalProcess] = {}

    def look(self, pid: int, of_descendants: bool) -> ProcessSample | None:
        """Observation of a process; ``None`` if there is none."""
        process = self._find(pid)
        if process is None:
            return None
        look = ProcessSample(is_stopped=process.is_stopped(), work=process.work())
        if not of_descendants:
            return look
        return ProcessSample(
            is_stopped=look.is_stopped,
            work=look.work,
            has_descendants=process.has_descendants(),
            descendants=process.descendants_work(),
        )

    def kill(self, pid: int) -> None:
        """End a process at once."""
        process = self._find(pid)
        if process is not None:
            process.kill()

    def _find(self, pid: int) -> LocalProcess | None:
        if pid not in self._processes:
            try:
                self._processes[pid] = LocalProcess(pid)
            except psutil.NoSuchProcess:
                return None
        return self._processes[pid]


class NodeWatches:
    """One for each machine, started when it is first asked for.

    It ends when nobody holds it any more: an autoscaler takes a machine that has one for busy, and
    would keep it for good.
    """

    def __init__(self) -> None:
        self._watches: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()

    def of(self, node_id: str) -> Any:
        """Sampler of a machine, by Ray's id of it."""
        watch = self._watches.get(node_id)
        if watch is None:
            watch = self._watches[node_id] = self._start(node_id)
        return watch

    def _start(self, node_id: str) -> Any:
        return (
            ray.remote(NodeWatch)
            .options(
                num_cpus=0,
                max_restarts=-1,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            )
            .remote()
        )


class RemoteProcess:
    """One of another machine.

    Args:
        watch: the `NodeWatch` there.
    """

    def __init__(
        self, watch: Any, pid: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.pid = pid
        self._watch = watch
        self._clock = clock
        self._question: Any = None
        self._asked_s = self._seen_s = -math.inf
        self._seen: ProcessSample | None = None
        self._of_descendants = False

    def is_stopped(self) -> bool:
        look = self._look()
        return look is not None and look.is_stopped

    def work(self) -> Work:
        look = self._look()
        return look.work if look is not None else UNKNOWN

    def has_descendants(self) -> bool:
        look = self._look()
        return look is None or look.has_descendants

    def descendants_work(self) -> Work:
        self._of_descendants = True
        look = self._look()
        return look.descendants if look is not None and look.descendants is not None else UNKNOWN

    def kill(self) -> None:
        self._watch.kill.remote(self.pid)

    def _look(self) -> ProcessSample | None:
        if self._question is not None and ray.wait([self._question], timeout=0)[0]:
            # The watch may have died, as with its machine.
            with contextlib.suppress(ray.exceptions.RayError):
                self._seen, self._seen_s = ray.get(self._question), self._asked_s
            self._question = None
        now_s = self._clock()
        if self._question is None and now_s - self._asked_s >= LOOK_INTERVAL_S:
            self._asked_s = now_s
            self._question = self._watch.look.remote(self.pid, self._of_descendants)
        return self._seen if now_s - self._seen_s < FRESH_S else None
