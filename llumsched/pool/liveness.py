"""When an instance that does not end by itself counts as dead.

    evidence                                     dead after
    its process is stopped, as by SIGSTOP        half a second
    its connection breaks                        a moment, in which Ray may say why
    no sign of life, and no sign of work         ``heartbeat_s``
    no sign of life, and it works                ``step_s``
    the engine's loop takes nothing up           ``step_s``, whatever the process does

A sign of life is a beat, twice a second (``heartbeat``), from a thread that does nothing else;
it tells for how long the engine's loop has not answered. Work is processor time that is used or
waited for, a wait for a disk, and the work of a descendant such as a compiler.

Silence is no evidence: a machine may have too little time for a healthy process, and a loop that
uses no processor may wait for a lock that another process holds, for a file system, or for a GPU.
So a loop that stands still is judged by nothing but the time it was given.

Invariant: one that beats, whose loop answers in time, and that stays connected is never called
dead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from llumsched.pool.process_activity import Work

# A debugger stops a process for a moment.
# Counted from the first look that sees it.
STOPPED_TIMEOUT_S = 0.4
# Of one whose connection breaks Ray may say in this time what it died of.
BROKEN_TIMEOUT_S = 0.3
# Silence shorter than this is between two beats.
SUSPICIOUS_S = 0.8
# Work is looked for over stretches of this length.
STRETCH_S = 0.5
# What threads that only wait use of a processor, and how often one of them is seen awake.
MAX_IDLE_SHARE = 0.1
MAX_READY_SHARE = 0.3


class Watched(Protocol):
    """A running process."""

    def is_stopped(self) -> bool:
        """True if the process is held by the system, as by SIGSTOP."""

    def work(self) -> Work:
        """Work of the process so far."""

    def has_descendants(self) -> bool:
        """True if the process has started others."""

    def descendants_work(self) -> Work:
        """Work of the descendants so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LivenessLimits:
    """``heartbeat_s``: the longest silence of a process that is not seen to work; ``step_s``: the
    longest step of an engine, and the longest silence of a process that works."""

    heartbeat_s: float
    step_s: float


class LivenessProbe:
    """Liveness of one instance, from when it begins to serve."""

    def __init__(self, limits: LivenessLimits) -> None:
        self._limits = limits
        self._is_stopped = False
        self._stopped_s = 0.0
        self._silent_s = 0.0
        self._loop_silent_s = 0.0
        self._watch: _WorkWatch | None = None
        self._has_beaten = False
        self._is_broken = False
        self._broken_s = 0.0

    def connection_broke(self) -> None:
        """Note that the connection to the frontend broke, whatever has been made since."""
        self._is_broken = True

    @property
    def is_quiet(self) -> bool:
        """True if nothing was amiss at the last look, so that the next one has time."""
        return (
            self._has_beaten
            and not self._is_stopped
            and not self._is_broken
            and self._silent_s < SUSPICIOUS_S
            and self._loop_silent_s < SUSPICIOUS_S
        )

    def tick(self, awake_s: float, beat: float | None, process: Watched) -> str | None:
        """Take in what was seen since the last call.

        Args:
            awake_s: how long that was.
            beat: the silence of the engine's loop that the last beat told, in seconds; ``None`` if
                there was none.

        Returns:
            why the instance is dead, or ``None``.
        """
        if beat is None:
            self._silent_s += awake_s
        else:
            self._silent_s, self._loop_silent_s = 0.0, beat
            self._has_beaten = True
        was_stopped, self._is_stopped = self._is_stopped, process.is_stopped()
        self._stopped_s = self._stopped_s + awake_s if was_stopped and self._is_stopped else 0.0
        self._broken_s += awake_s if self._is_broken else 0.0
        if self._broken_s > BROKEN_TIMEOUT_S:
            return "its connection to the frontend broke"
        if self._stopped_s > STOPPED_TIMEOUT_S:
            return "its process was stopped"
        if self._silent_s > self._limits.step_s:
            return f"it gave no sign of life for {self._silent_s:.1f} s"
        if self._loop_silent_s > self._limits.step_s:
            return f"its engine's loop has stood still for {self._loop_silent_s:.1f} s"
        if not self._has_beaten or self._silent_s < SUSPICIOUS_S:
            # One that never beat is being told to serve, and may have to wait for that.
            self._watch = None
        elif self._watch is None:
            self._watch = _WorkWatch(process)
        else:
            idle_s = self._watch.idle_s(awake_s)
            if idle_s > self._limits.heartbeat_s:
                return f"it hangs: no sign of life for {self._silent_s:.1f} s, and no work"
        return None


class _WorkWatch:
    """For how long a silent process has not been seen to work.

    Its descendants are looked for only once it does nothing itself: that takes a while.
    """

    def __init__(self, process: Watched) -> None:
        self._process = process
        self._idle_s = 0.0
        self._observe(of_descendants=False)

    def _observe(self, *, of_descendants: bool) -> None:
        self._of_descendants = of_descendants
        self._work = self._process.descendants_work if of_descendants else self._process.work
        self._cpu_s = self._work().cpu_s
        self._lasts_s = 0.0
        self._num_looks = self._num_ready = 0

    def idle_s(self, awake_s: float) -> float:
        """Seconds without work, at the end of so many more."""
        self._idle_s += awake_s
        self._lasts_s += awake_s
        work = self._work()
        self._num_looks += 1
        self._num_ready += work.is_ready
        if self._lasts_s < STRETCH_S:
            return self._idle_s
        used_s = work.cpu_s - self._cpu_s
        # Of a process on a machine that does not answer nothing is known.
        if math.isfinite(used_s) and (
            used_s > MAX_IDLE_SHARE * self._lasts_s
            or self._num_ready > MAX_READY_SHARE * self._num_looks
        ):
            self._idle_s = 0.0
            self._observe(of_descendants=False)
        else:
            self._observe(
                of_descendants=not self._of_descendants and self._process.has_descendants()
            )
        return self._idle_s
