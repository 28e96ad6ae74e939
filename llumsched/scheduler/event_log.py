"""Log lines of the global scheduler: one for each move, drain, launch, loss and failure.

Invariant: what changes the pool or moves a request is one line at INFO, with the ids that other
lines and the decision log know it by; what happens for every request is at DEBUG. A policy that
fails is said once with its traceback, and then once in a while. This module decides nothing, and
reads no state of the scheduler but which instances drain.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable

from llumsched.core.actions import (
    Action,
    LaunchInstance,
    PolicyFailed,
    RejectRequest,
    StartMigration,
    TerminateInstance,
)
from llumsched.core.events import (
    DrainRequested,
    Event,
    InstanceJoined,
    InstanceLost,
    LaunchFailed,
    MigrationOutcome,
    ScaleRequested,
)
from llumsched.logs import FailureLog, counted
from llumsched.policy_failures import log_failure
from llumsched.wire.control import MigrationStatistics, ReportMigration

logger = logging.getLogger(__name__)

BYTES_PER_MB = 1_000_000


class SchedulerLog:
    """Args:
    draining: the ids of the instances that are being drained, at the moment of the call.
    on_drain: called once for each instance that begins to be drained.
    """

    def __init__(
        self,
        draining: Callable[[], Collection[str]],
        on_drain: Callable[[], None] = lambda: None,
    ) -> None:
        self._draining = draining
        self._on_drain = on_drain
        self._known_draining: frozenset[str] = frozenset()
        self._failures = FailureLog(logger)

    def handled(self, event: Event, actions: Iterable[Action]) -> None:
        """The scheduler has handled ``event`` and decided ``actions``."""
        self._event(event)
        for action in actions:
            self._action(action)
        self._drains()

    def migration_ended(self, report: ReportMigration) -> None:
        """A source has reported how a migration ended."""
        statistics = report.statistics
        outcome = report.outcome.replace("_", " ")
        quiet = report.outcome == MigrationOutcome.NOTHING_TO_MOVE
        logger.log(
            logging.DEBUG if quiet else logging.INFO,
            "Migration %s of %s %s from %s to %s: %s%s%s",
            report.migration_id,
            "the KV of ended request" if report.has_ended else "request",
            report.request_id,
            report.source,
            report.destination,
            outcome,
            f" ({report.reason})" if report.reason else "",
            f"; {_cost(statistics)}" if statistics is not None else "",
            extra={
                "migration_id": report.migration_id,
                "request_id": report.request_id,
                "instance_id": report.source,
                "destination_id": report.destination,
                "outcome": report.outcome,
                "cause": report.cause,
            },
        )

    def _event(self, event: Event) -> None:
        match event:
            case InstanceJoined():
                logger.info(
                    "%s has joined, with %s and %s",
                    event.spec.instance_id,
                    counted(event.spec.num_total_blocks, "KV block"),
                    counted(len(event.request_ids), "request"),
                    extra={"instance_id": event.spec.instance_id},
                )
            case InstanceLost():
                # A loss is a line of the launcher, which knows whether it was meant.
                logger.debug(
                    "%s is gone: %s",
                    event.instance_id,
                    event.reason,
                    extra={"instance_id": event.instance_id},
                )
            case DrainRequested():
                # One that is empty has left by the time that `_drains` looks.
                self._drained(event.instance_id, "as asked")
            case ScaleRequested():
                logger.info("Scaling to %s, as asked", counted(event.num_instances, "instance"))
            case LaunchFailed():
                self._failures.failed(
                    ("launch", event.reason),
                    "The instance of %s does not come: %s",
                    event.launch_id,
                    event.reason,
                    level=logging.WARNING,
                )
            case _:
                pass

    def _action(self, action: Action) -> None:
        match action:
            case StartMigration():
                logger.debug(
                    "Migration %s of %s from %s to %s begins: %s",
                    action.migration_id,
                    f"request {action.request_id}" if action.request_id else "any request",
                    action.source,
                    action.destination,
                    action.reason,
                    extra={"migration_id": action.migration_id, "request_id": action.request_id},
                )
            case LaunchInstance():
                logger.info("Launching one more instance (%s): %s", action.launch_id, action.reason)
            case TerminateInstance():
                logger.info(
                    "%s may leave: %s",
                    action.instance_id,
                    action.reason,
                    extra={"instance_id": action.instance_id},
                )
            case RejectRequest():
                logger.debug(
                    "Request %s is rejected: %s",
                    action.request_id,
                    action.reason,
                    extra={"request_id": action.request_id},
                )
            case PolicyFailed():
                log_failure(self._failures, action)
            case _:
                pass

    def _drains(self) -> None:
        draining = self._draining()
        if len(draining) == len(self._known_draining) and self._known_draining.issuperset(draining):
            return
        for instance_id in sorted(frozenset(draining) - self._known_draining):
            self._drained(instance_id, "which the pool can do without")
        self._known_draining = frozenset(draining)

    def _drained(self, instance_id: str, why: str) -> None:
        if instance_id not in self._known_draining:
            self._known_draining |= {instance_id}
            logger.info("Draining %s, %s", instance_id, why, extra={"instance_id": instance_id})
            self._on_drain()


def _cost(statistics: MigrationStatistics) -> str:
    return (
        f"{statistics.total_s:.3f} s in {counted(statistics.num_stages, 'stage')}, suspended for"
        f" {statistics.suspended_s:.3f} s, {counted(statistics.num_blocks, 'block')}"
        f" ({statistics.num_bytes / BYTES_PER_MB:.1f} MB) over {statistics.transport}"
    )
