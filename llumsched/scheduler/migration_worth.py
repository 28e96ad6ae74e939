"""Gains of migrations: what each was expected to save, and what it saved.

A migration saves waiting if its source would have run out of room with the request. So a request
that has moved is followed on, as if it had stayed: it grows by a token a step, and
whenever the source has fewer free blocks than it would fill, somebody there would have stood still.
What else the source would then have been sent is not known: the sum is an upper bound.

Invariant: each followed migration is told of once, when its request ends or moves again, or when
its source is lost; at most ``MOST_FOLLOWED`` are followed. This module decides nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llumsched.core.actions import Action, StartMigration
from llumsched.core.events import (
    Event,
    InstanceLost,
    LoadReported,
    MigrationOutcome,
    RequestAborted,
    RequestFinished,
)
from llumsched.core.load import InstanceLoad
from llumsched.wire.control import ReportMigration

MOST_FOLLOWED = 1000
# A report that comes later than this says nothing of the time before it.
MOST_BETWEEN_REPORTS_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationWorth:
    """``won_s`` is how long its source had no room for the request after it had left."""

    migration_id: str
    request_id: str
    source: str
    won_s: float
    expected_s: float | None


@dataclass(slots=True, kw_only=True)
class _Followed:
    migration_id: str
    source: str
    expected_s: float | None
    num_tokens: float
    tokens_of_a_block: float
    step_time_s: float
    looked_s: float
    won_s: float = 0.0

    def look(self, load: InstanceLoad, now_s: float) -> None:
        passed_s = min(now_s - self.looked_s, MOST_BETWEEN_REPORTS_S)
        self.looked_s = now_s
        self.num_tokens += passed_s / (load.step_time_s or self.step_time_s)
        if load.num_free_blocks * self.tokens_of_a_block < self.num_tokens:
            self.won_s += passed_s


class MigrationWorths:
    """Every call returns the worth of the migrations that are known by it."""

    def __init__(self) -> None:
        self._ordered: OrderedDict[str, float | None] = OrderedDict()
        self._followed: OrderedDict[str, _Followed] = OrderedDict()

    def handled(
        self, event: Event, actions: Iterable[Action], now_s: float
    ) -> Iterator[MigrationWorth]:
        """The scheduler has handled ``event`` and decided ``actions``."""
        for action in actions:
            if isinstance(action, StartMigration):
                self._ordered[action.migration_id] = action.expected_win_s
                if len(self._ordered) > MOST_FOLLOWED:
                    self._ordered.popitem(last=False)
        if not self._followed:
            return
        match event:
            case LoadReported(load=load):
                for followed in self._followed.values():
                    if followed.source == load.instance_id:
                        followed.look(load, now_s)
            case RequestFinished() | RequestAborted():
                yield from self._ended(event.request_id)
            case InstanceLost():
                for request_id, followed in list(self._followed.items()):
                    if followed.source == event.instance_id:
                        yield from self._ended(request_id)
            case _:
                pass

    def migration_ended(self, report: ReportMigration, now_s: float) -> Iterator[MigrationWorth]:
        """A source has reported how a migration ended; one without KV is not followed."""
        expected_s = self._ordered.pop(report.migration_id, None)
        statistics, request_id = report.statistics, report.request_id
        if report.has_ended:
            return
        if report.outcome != MigrationOutcome.COMMITTED or statistics is None or request_id is None:
            return
        yield from self._ended(request_id)
        num_blocks = statistics.num_blocks + statistics.num_cached_blocks
        if not num_blocks or not statistics.step_time_s:
            return
        self._followed[request_id] = _Followed(
            migration_id=report.migration_id,
            source=report.source,
            expected_s=expected_s,
            num_tokens=statistics.num_tokens,
            tokens_of_a_block=statistics.num_tokens / num_blocks,
            step_time_s=statistics.step_time_s,
            looked_s=now_s,
        )
        if len(self._followed) > MOST_FOLLOWED:
            yield from self._ended(next(iter(self._followed)))

    def _ended(self, request_id: str) -> Iterator[MigrationWorth]:
        followed = self._followed.pop(request_id, None)
        if followed is not None:
            yield MigrationWorth(
                migration_id=followed.migration_id,
                request_id=request_id,
                source=followed.source,
                won_s=followed.won_s,
                expected_s=followed.expected_s,
            )
