"""Idle time is free: a long gap in which nothing is under way is cut out of the simulated clock.

What follows a gap comes earlier on the clock of the simulation, by the length of what is cut out:
scheduler, reports and engines go on as after a shorter gap. Records have the real time, which is
that of the clock plus all that was cut out before (`Kernel.skipped`). What is cut out is a whole
number of every period, so reports and decisions come at the same distance from the next arrival as
without it.

Invariant: time is cut out only while no request is live and nothing is in the heap, after a wait
that lets what is periodic settle; never where the number of instances may change with time. This
module does not know what fills the time that is left.
"""

from __future__ import annotations

import math

from llumsched.core.options import SchedulerOptions
from llumsched.simulator.kernel import PS_PER_S, to_ps
from llumsched.simulator.options import SimulationOptions

# How long nothing has happened before time is cut out, and what is left before the next arrival.
_SETTLES_S = 10.0
_LEFT_S = 2.0
# Periods that have no common multiple up to this are not kept in step.
_LONGEST_PERIOD = 3600 * PS_PER_S


class IdleTime:
    """How much time can be left out, and whether any can."""

    def __init__(
        self, options: SimulationOptions, scheduler: SchedulerOptions, *, victim_interval: int
    ) -> None:
        interval = to_ps(options.report_interval_s)
        period = math.lcm(
            interval,
            victim_interval,
            to_ps(scheduler.migration_interval_s),
            to_ps(scheduler.scaling_interval_s),
        )
        self._period = period if period <= _LONGEST_PERIOD else 1
        self._left = to_ps(_LEFT_S + options.report_delay_s) + 2 * interval
        self._settles = max(to_ps(_SETTLES_S), to_ps(2 * scheduler.migration_settle_s))
        self._is_fixed = not scheduler.max_instances
        self.busy_at = 0
        """When something happened last that is not periodic."""

    def length(self, now: int, next_time: int) -> int:
        """Picoseconds that can be cut out now, with the next thing to happen at `next_time`."""
        if not self._is_fixed or now < self.busy_at + self._settles:
            return 0
        return max(0, next_time - self._left - now) // self._period * self._period
