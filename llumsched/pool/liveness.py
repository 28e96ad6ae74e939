"""When an instance that does not end by itself counts as dead.

    sign                                         what it says
    a beat, ten times a second (``heartbeat``)   its process runs
    the loop's silence, which a beat tells       its engine's loop takes up what it is asked
    the state and the work of its process        if there is no sign: whether it hangs or is busy
    its connection breaks                        what it has sent since may be lost

A step takes as long as its prompt, and a machine may have too little time for a healthy process,
so silence alone is no proof: at once dead is only one that is silent *and* does nothing. Where the
work is done by a GPU, its loop may rightly wait without using a processor, so of a loop that stands
still only the time is judged there.

Invariant: one that beats, whose loop answers in time, and that stays connected is never called
dead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from llumsched.pool.process_activity import Work

# A debugger stops a process for a moment.
STOPPED_TIMEOUT_S = 0.5
# Of one whose connection breaks Ray may say in this time what it died of.
BROKEN_TIMEOUT_S = 0.3
# Silence shorter than this is between two beats.
SUSPICIOUS_S = 0.3
# For so long nothing was done either.
IDLE_TIMEOUT_S = 0.5
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
    """``heartbeat_s``: the longest silence of a process that is busy; ``step_s``: the longest step
    of an engine; ``loop_uses_cpu``: whether an engine's loop that works uses processor time."""

    heartbeat_s: float
    step_s: float
    loop_uses_cpu: bool


class LivenessProbe:
    """Liveness of one instance, from when it begins to serve."""

    def __init__(self, limits: LivenessLimits) -> None:
        self._limits = limits
        self._stopped_s = 0.0
        self._silent_s = 0.0
        self._loop_silent_s = 0.0
        self._suspicion: _Suspicion | None = None
        self._has_beaten = False
        self._is_broken = False
        self._broken_s = 0.0

    def connection_broke(self) -> None:
        """Note that the connection to the frontend broke, whatever has been made since."""
        self._is_broken = True

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
        self._stopped_s = self._stopped_s + awake_s if process.is_stopped() else 0.0
        self._broken_s += awake_s if self._is_broken else 0.0
        if self._broken_s > BROKEN_TIMEOUT_S:
            return "its connection to the frontend broke"
        if self._stopped_s > STOPPED_TIMEOUT_S:
            return "its process was stopped"
        if self._silent_s > self._limits.heartbeat_s:
            return f"it gave no sign of life for {self._silent_s:.1f} s"
        if self._loop_silent_s > self._limits.step_s:
            return f"its engine's loop has stood still for {self._loop_silent_s:.1f} s"
        loop_silent_s = self._loop_silent_s if self._limits.loop_uses_cpu else 0.0
        if not self._has_beaten:
            return None  # it is being told to serve, and may have to wait for that
        if max(self._silent_s, loop_silent_s) < SUSPICIOUS_S:
            self._suspicion = None
        elif self._suspicion is None:
            self._suspicion = _Suspicion(process)
        elif self._suspicion.is_confirmed(awake_s):
            if self._silent_s >= SUSPICIOUS_S:
                return f"it hangs: no sign of life for {self._silent_s:.1f} s, and no work"
            return f"its engine's loop hangs: no answer for {loop_silent_s:.1f} s, and no work"
        return None


class _Suspicion:
    """Judges if a silent process does nothing, over one stretch of time after another.

    Its descendants are looked for only once it does nothing itself: that takes a while.
    """

    def __init__(self, process: Watched) -> None:
        self._process = process
        self._observe(of_descendants=False)

    def _observe(self, *, of_descendants: bool) -> None:
        self._of_descendants = of_descendants
        self._work = self._process.descendants_work if of_descendants else self._process.work
        self._cpu_s = self._work().cpu_s
        self._lasts_s = 0.0
        self._num_looks = self._num_ready = 0

    def is_confirmed(self, awake_s: float) -> bool:
        self._lasts_s += awake_s
        work = self._work()
        self._num_looks += 1
        self._num_ready += work.is_ready
        if self._lasts_s < IDLE_TIMEOUT_S:
            return False
        is_idle = (
            work.cpu_s - self._cpu_s <= MAX_IDLE_SHARE * self._lasts_s
            and self._num_ready <= MAX_READY_SHARE * self._num_looks
        )
        if is_idle and (self._of_descendants or not self._process.has_descendants()):
            return True
        self._observe(of_descendants=is_idle)
        return False
