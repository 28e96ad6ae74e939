"""The global scheduler as the simulated cluster holds it: the same object that serves production.

Invariant: every event it is given is in the decision log, in order, with the time it was given at;
it is woken when it asks for it, and not more often. This module does not know what its actions do.
"""

from __future__ import annotations

import math
from dataclasses import replace

from llumsched.config import build_bundle
from llumsched.core.actions import Action
from llumsched.core.events import Event, Ticked
from llumsched.core.scheduling.scheduler import GlobalScheduler
from llumsched.decision_log import DecisionLog
from llumsched.simulator.kernel import NEVER, PS_PER_S
from llumsched.simulator.options import SimulationOptions

# The scheduler is not woken more often than this, whatever it asks for.
SHORTEST_WAIT = PS_PER_S // 1_000_000
# A simulation's log is for replaying: all of it is kept.
ALL_SEGMENTS = 1_000_000


class SchedulerPort:
    """Hands events in; `wake_at` is when the next `wake` is due."""

    def __init__(self, options: SimulationOptions) -> None:
        config = options.config
        if options.seed is not None:
            config = replace(config, seed=options.seed)
        self.bundle = build_bundle(config)
        self.scheduler = GlobalScheduler(self.bundle, seed=config.seed)
        self.migration_options = config.migration_options
        self._rng = self.scheduler.snapshot(0.0).rng
        self._seeded = self._rng.getstate()
        self.wake_at = NEVER
        self._deadline_s = math.inf
        self._log: DecisionLog | None = None
        if options.decision_log is not None:
            self._log = DecisionLog(
                options.decision_log,
                config,
                self.scheduler.checkpoint,
                max_segments=ALL_SEGMENTS,
            )

    def handle(self, event: Event, now: int) -> tuple[Action, ...]:
        """The scheduler's actions on an event; its deadline may have moved (see `replan`)."""
        now_s = now / PS_PER_S
        actions = self.scheduler.handle(event, now_s)
        if self._log is not None:
            self._log.write(now_s, event, actions)
        return actions

    def wake(self, now: int) -> tuple[Action, ...]:
        """The scheduler's actions at its deadline."""
        # Picoseconds are finer than the deadline's last digit: it must not seem to be early.
        now_s = max(self._deadline_s, now / PS_PER_S)
        actions = self.scheduler.handle(Ticked(), now_s)
        if self._log is not None:
            self._log.write(now_s, Ticked(), actions)
        self.replan(now + SHORTEST_WAIT)
        return actions

    def replan(self, at_least: int) -> None:
        """Ask when it wants to be woken."""
        deadline_s = self.scheduler.next_deadline()
        if deadline_s is None:
            self.wake_at = NEVER
        else:
            self._deadline_s = deadline_s
            self.wake_at = max(at_least, int(deadline_s * PS_PER_S) + 1)

    @property
    def has_drawn(self) -> bool:
        """True if any decision took something from the scheduler's randomness."""
        return self._rng.getstate() != self._seeded

    def close(self) -> None:
        """End the log."""
        if self._log is not None:
            self._log.close()
