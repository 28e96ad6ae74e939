"""Histories of the last requests, step by step, for ``llumsched trace``.

    arrived -> held -> dispatched -> migration begins -> migration ends ... -> lost -> ... finished

Invariant: at most ``MOST_REQUESTS`` requests are kept, and ``MOST_STEPS`` steps of each; the oldest
go first. Loads are kept as the reports that were known, and put into words only when somebody asks.
A scheduler that was started again remembers nothing of before. This module decides nothing.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from llumsched.core.actions import Action, DispatchRequest, RejectRequest, StartMigration
from llumsched.core.events import (
    Event,
    InstanceLost,
    MigrationOutcome,
    RequestAborted,
    RequestArrived,
    RequestFinished,
    RequestSentElsewhere,
)
from llumsched.core.load import InstanceLoad
from llumsched.core.types import Scores
from llumsched.logs import counted
from llumsched.scheduler.migration_worth import MigrationWorth
from llumsched.wire.control import Candidate, MigrationStatistics, ReportMigration, TraceStep

MOST_REQUESTS = 2000
MOST_STEPS = 64
MOST_CANDIDATES = 8
NO_SCORES: Mapping[str, Scores] = MappingProxyType({})


@dataclass(slots=True)
class _Step:
    at_s: float
    kind: str
    text: str
    instance_id: str | None = None
    migration_id: str | None = None
    loads: tuple[InstanceLoad, ...] = ()
    scores: Scores | None = None
    statistics: MigrationStatistics | None = None


class RequestHistory:
    """Args:
    loads: the last load report of every instance, by its id.
    clock: seconds since the epoch, so that a step can be laid beside a log.
    """

    def __init__(
        self,
        loads: Callable[[], Mapping[str, InstanceLoad]],
        clock: Callable[[], float] = time.time,
        most_requests: int = MOST_REQUESTS,
    ) -> None:
        self._loads = loads
        self._clock = clock
        self._most_requests = most_requests
        self._requests: OrderedDict[str, list[_Step]] = OrderedDict()
        self._at: dict[str, str] = {}

    def handled(
        self, event: Event, actions: Iterable[Action], scores: Mapping[str, Scores] = NO_SCORES
    ) -> None:
        """The scheduler has handled ``event`` and decided ``actions``.

        Args:
            scores: by what instances were compared, by the request that was dispatched.
        """
        arrived = None
        match event:
            case RequestArrived() if event.has_begun or event.request.request_id not in self._at:
                arrived = event.request.request_id
                again = ", again, since its instance was lost" if event.has_begun else ""
                text = f"{event.request.num_prompt_tokens} prompt tokens{again}"
                self._note(arrived, "arrived", text)
            case RequestSentElsewhere():
                self._at[event.request.request_id] = event.instance_id
                text = "by its frontend: the scheduler was silent, or the engine paused"
                self._note(event.request.request_id, "dispatched", text, event.instance_id)
            case RequestFinished():
                tokens = event.num_output_tokens
                self._end(event.request_id, "finished", f"{tokens} output tokens" if tokens else "")
            case RequestAborted():
                self._end(event.request_id, "aborted", "its client left, or its frontend died")
            case InstanceLost():
                lost = [r for r, i in self._at.items() if i == event.instance_id]
                for request_id in lost:
                    self._note(request_id, "lost", event.reason, event.instance_id)
            case _:
                pass
        for action in actions:
            self._decided(action, scores)
            if isinstance(action, DispatchRequest | RejectRequest) and action.request_id == arrived:
                arrived = None
        if arrived is not None and arrived not in self._at:
            self._note(arrived, "held", "no instance takes it yet")

    def migration_ended(self, report: ReportMigration) -> None:
        """A source has reported how a migration ended."""
        if report.request_id is None or report.request_id not in self._requests:
            return
        text = f"{report.outcome} at {report.destination}"
        statistics = report.statistics
        if statistics is not None:
            text += (
                f": {counted(statistics.num_stages, 'stage')},"
                f" {counted(statistics.num_blocks, 'block')},"
                f" {statistics.num_bytes} bytes over {statistics.transport},"
                f" {1000 * statistics.total_s:.0f} ms,"
                f" suspended for {1000 * statistics.suspended_s:.1f} ms"
            )
        if report.reason:
            text += f" ({report.reason})"
        step = self._note(
            report.request_id, "migration ended", text, report.source, report.migration_id
        )
        step.statistics = statistics
        if report.outcome == MigrationOutcome.COMMITTED and report.request_id in self._at:
            self._at[report.request_id] = report.destination

    def migration_won(self, won: MigrationWorth) -> None:
        """The worth of a migration is known by now."""
        if won.request_id in self._requests:
            expected = "" if won.expected_s is None else f", expected were {won.expected_s:.2f} s"
            text = f"its source would have had no room for it for {won.won_s:.2f} s{expected}"
            self._note(won.request_id, "migration won", text, won.source, won.migration_id)

    def steps(self, request_id: str) -> dict[str, list[TraceStep]]:
        """The steps of a request, by id: there may be several sequences of the id that is asked."""
        return {
            name: [_told(step) for step in steps]
            for name, steps in self._requests.items()
            if name == request_id or name.startswith(f"{request_id}-")
        }

    def _decided(self, action: Action, scores: Mapping[str, Scores]) -> None:
        match action:
            case DispatchRequest():
                self._at[action.request_id] = action.instance_id
                loads = tuple(self._loads().values())
                step = self._note(
                    action.request_id, "dispatched", action.reason, action.instance_id
                )
                step.loads, step.scores = loads, scores.get(action.request_id)
            case RejectRequest():
                self._end(action.request_id, "rejected", action.reason)
            case StartMigration() if action.request_id is not None:
                text = f"to {action.destination}: {action.reason}"
                self._note(
                    action.request_id,
                    "migration begins",
                    text,
                    action.source,
                    action.migration_id,
                )
            case _:
                pass

    def _end(self, request_id: str, kind: str, text: str) -> None:
        if self._at.pop(request_id, None) is not None or kind == "rejected":
            self._note(request_id, kind, text)

    def _note(
        self,
        request_id: str,
        kind: str,
        text: str,
        instance_id: str | None = None,
        migration_id: str | None = None,
    ) -> _Step:
        step = _Step(self._clock(), kind, text, instance_id, migration_id)
        steps = self._requests.setdefault(request_id, [])
        if len(steps) >= MOST_STEPS:
            del steps[1]
        steps.append(step)
        while len(self._requests) > self._most_requests:
            oldest, _ = self._requests.popitem(last=False)
            self._at.pop(oldest, None)
        return step


def _told(step: _Step) -> TraceStep:
    freest_first = sorted(
        step.loads, key=lambda load: (load.instance_id != step.instance_id, -load.num_free_blocks)
    )
    scores = step.scores
    return TraceStep(
        at_s=step.at_s,
        kind=step.kind,
        text=step.text,
        instance_id=step.instance_id,
        migration_id=step.migration_id,
        candidates=[
            Candidate(
                instance_id=load.instance_id,
                num_free_blocks=load.num_free_blocks,
                num_total_blocks=load.num_total_blocks,
                num_running=load.num_running,
                num_waiting=load.num_waiting,
                score=scores.of(load.instance_id) if scores is not None else None,
            )
            for load in freest_first[:MOST_CANDIDATES]
        ],
        scored_by=scores.name if scores is not None else "",
        statistics=step.statistics,
    )
