"""Counts and durations of the scheduler's process, as Prometheus metrics.

The values lie in memory-mapped files of a folder that the launcher owns (``prometheus_client``'s
multiprocess mode). So they go on where they were when the scheduler is started again, and every
frontend can show them without asking. Gauges are not here: they tell of a moment, which a scheduler
that has ended cannot.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram, values
from prometheus_client.samples import Sample

from llumsched import metrics
from llumsched.core.actions import (
    Action,
    DispatchRequest,
    LaunchInstance,
    PolicyFailed,
    RejectRequest,
    StartMigration,
    TerminateInstance,
)
from llumsched.core.events import Event, LaunchFailed, MigrationOutcome, RequestFinished
from llumsched.scheduler.migration_worth import MigrationWorth
from llumsched.wire.control import ReportMigration

PROCESS = "scheduler"
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

# Policies give reasons in words and numbers; with the numbers each would be a series of its own.
_NUMBER = re.compile(
    r"(?:(?<!\w)[-+])?(?:\d[\d.,]*(?:e[-+]?\d+)?|\binf\b|\bnan\b)%?", re.IGNORECASE
)
MOST_REASONS = 50
OTHER = "other"


def keep_in(folder: Path) -> None:
    """Keep the values of all metrics that this process makes from now on in files there."""
    os.environ[FOLDER_VARIABLE] = str(folder)
    values.ValueClass = values.MultiProcessValue(lambda: PROCESS)  # type: ignore[no-untyped-call]


class Reasons:
    """Reasons of policies as few label values."""

    def __init__(self, most: int = MOST_REASONS) -> None:
        self._most = most
        self._known: set[str] = set()

    def label(self, reason: str) -> str:
        """The reason with N for every number; ``other`` once there are too many."""
        words = _NUMBER.sub("N", reason)
        if words not in self._known:
            if len(self._known) >= self._most:
                return OTHER
            self._known.add(words)
        return words


class SchedulerMetrics:
    """One set for a scheduler.

    Args:
        policy: the bundle in force.
    parts: the policies in it, by the names that their failures are told under.
    """

    def __init__(
        self,
        policy: str,
        parts: Iterable[str] = (),
        registry: CollectorRegistry | None = None,
    ) -> None:
        registry = registry if registry is not None else CollectorRegistry()
        self._policy = policy
        self._reasons = Reasons()
        self._migration_reasons = Reasons()
        self._decision_s = metrics.DECISION.histogram(registry)
        self._decision_s_of: dict[type, Histogram] = {}
        self._dispatches = metrics.DISPATCHES.counter(registry)
        self._rejections = metrics.REJECTIONS.counter(registry)
        self._started = metrics.MIGRATIONS_STARTED.counter(registry)
        self._migrations = metrics.MIGRATIONS.counter(registry)
        self._migration_s = metrics.MIGRATION_SECONDS.histogram(registry)
        self._suspended_s = metrics.MIGRATION_PAUSE.histogram(registry)
        self._num_bytes = metrics.MIGRATION_BYTES.histogram(registry)
        self._num_blocks = metrics.MIGRATION_BLOCKS.histogram(registry)
        self._num_stages = metrics.MIGRATION_STAGES.histogram(registry)
        self._expected_s = metrics.MIGRATION_EXPECTED.histogram(registry)
        self._won_s = metrics.MIGRATION_WON.histogram(registry)
        self._session_moves = metrics.SESSION_MOVES.counter(registry)
        self._session_bytes = metrics.SESSION_MOVED_BYTES.counter(registry)
        self._session_tokens = metrics.SESSION_MOVED_TOKENS.counter(registry)
        self._failures = metrics.POLICY_FAILURES.counter(registry)
        for name in parts:
            self._failures.labels(name)
        self._scaling = metrics.SCALING_ACTIONS.counter(registry)
        self._finished = metrics.FINISHED_REQUESTS.counter(registry)
        self._output_tokens = metrics.OUTPUT_TOKENS.counter(registry)
        metrics.SCHEDULER_STARTS.counter(registry).inc()

    def handled(self, event: Event, actions: Iterable[Action], took_s: float) -> None:
        """The scheduler has taken ``took_s`` to handle ``event`` and decide ``actions``."""
        kind = type(event)
        decision_s = self._decision_s_of.get(kind)
        if decision_s is None:
            decision_s = self._decision_s_of[kind] = self._decision_s.labels(kind.__name__)
        decision_s.observe(took_s)
        match event:
            case LaunchFailed():
                self._scaling.labels("launch_failed").inc()
            case RequestFinished():
                self._finished.inc()
                self._output_tokens.inc(event.num_output_tokens or 0)
            case _:
                pass
        for action in actions:
            self._decided(action)

    def drained(self) -> None:
        """One instance more is being drained."""
        self._scaling.labels("drain").inc()

    def migration_ended(self, report: ReportMigration) -> None:
        """A source has reported how a migration ended."""
        if report.has_ended:
            self._session_moved(report)
            return
        self._migrations.labels(report.outcome, report.phase, report.cause).inc()
        statistics = report.statistics
        if statistics is None or report.outcome != MigrationOutcome.COMMITTED:
            return
        self._migration_s.observe(statistics.total_s)
        self._suspended_s.observe(statistics.suspended_s)
        self._num_bytes.observe(statistics.num_bytes)
        self._num_blocks.observe(statistics.num_blocks)
        self._num_stages.observe(statistics.num_stages)

    def _session_moved(self, report: ReportMigration) -> None:
        self._session_moves.labels(report.outcome, report.cause).inc()
        if report.statistics is not None:
            self._session_bytes.inc(report.statistics.num_bytes)
            self._session_tokens.inc(report.statistics.num_tokens)

    def migration_won(self, worth: MigrationWorth) -> None:
        """The worth of a migration is known by now."""
        self._won_s.observe(worth.won_s)
        if worth.expected_s is not None:
            self._expected_s.observe(max(0.0, worth.expected_s))

    @property
    def outcomes(self) -> dict[str, int]:
        """Migrations that ended, by outcome; none that has not happened."""
        return _by(self._migrations, "outcome")

    @property
    def causes(self) -> dict[str, int]:
        """Migrations that moved nothing, by cause."""
        return _by(self._migrations, "cause")

    @property
    def policy_failures(self) -> dict[str, int]:
        """Decisions in which a policy failed, by policy."""
        return _by(self._failures, "policy")

    @property
    def num_finished_requests(self) -> int:
        """Requests that finished by themselves."""
        return sum(int(s.value) for s in _samples(self._finished))

    @property
    def num_output_tokens(self) -> int:
        """Output tokens of the requests that finished."""
        return sum(int(s.value) for s in _samples(self._output_tokens))

    def _decided(self, action: Action) -> None:
        match action:
            case DispatchRequest():
                self._dispatches.labels(self._policy, self._reasons.label(action.reason)).inc()
            case RejectRequest():
                self._rejections.labels(action.rejection.value).inc()
            case StartMigration():
                self._started.labels(self._migration_reasons.label(action.reason)).inc()
            case LaunchInstance():
                self._scaling.labels("launch").inc()
            case TerminateInstance():
                self._scaling.labels("terminate").inc()
            case PolicyFailed():
                self._failures.labels(action.policy).inc()
            case _:
                pass


def _samples(counter: Counter) -> Iterable[Sample]:
    for family in counter.collect():
        yield from (sample for sample in family.samples if sample.name.endswith("_total"))


def _by(counter: Counter, label: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for sample in _samples(counter):
        if sample.value and sample.labels[label]:
            key = sample.labels[label]
            found[key] = found.get(key, 0) + int(sample.value)
    return found
