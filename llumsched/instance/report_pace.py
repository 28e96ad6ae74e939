"""When an instance reports its load next.

    something runs, waits or moves here     ten times a second
    nothing does                            once a second: the scheduler is to know that it lives
    a large change, or the first step       at once
    after an idle time

Invariant: whatever has changed is reported within ``REPORT_INTERVAL_S``, or the instance is idle
and nothing has. This module does not know what a load is read from, nor who waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from llumsched.core.load import InstanceLoad

REPORT_INTERVAL_S = 0.1
IDLE_REPORT_INTERVAL_S = 1.0
# A migration that has been spoken of may yet reserve blocks here.
STAYS_AWAKE_S = 1.0


class ReportPace:
    """The pace of one instance's reports. ``read`` and ``stepped`` are for the engine's thread,
    the rest is for the llumlet's.

    Args:
        idle_interval_s: between two reports of an idle instance.
    """

    def __init__(
        self,
        idle_interval_s: float = IDLE_REPORT_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._idle_interval_s = max(REPORT_INTERVAL_S, idle_interval_s)
        self._clock = clock
        self._is_idle = False
        self._awake_until_s = 0.0

    def read(self, load: InstanceLoad) -> None:
        """Take in the load that is reported now."""
        self._is_idle = not (
            load.num_running
            or load.num_waiting
            or load.num_migrations_in
            or load.num_migrations_out
            or load.num_reserved_blocks
            or load.received_request_ids
            or load.finished_request_ids
        )

    def stepped(self) -> bool:
        """True if the step that has just ended is to be reported, whatever it changed."""
        return self._is_idle

    def migrates(self) -> None:
        """Another instance, or the scheduler, has spoken of a migration."""
        self._awake_until_s = self._clock() + STAYS_AWAKE_S

    @property
    def rests(self) -> bool:
        """True if there is nothing to tell but that the instance lives."""
        return self._is_idle and self._clock() >= self._awake_until_s

    @property
    def pause_s(self) -> float:
        """Seconds until the next report, if nothing happens before."""
        return self._idle_interval_s if self.rests else REPORT_INTERVAL_S
