"""Operators who wait for the end of a migration that they asked for.

Invariant: each is answered once: when the source reports, or when it is dead and cannot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llumsched.core.actions import StartMigration
from llumsched.wire.control import MigrateAnswer, ReportMigration

Answer = tuple[bytes, MigrateAnswer]


@dataclass(frozen=True, slots=True)
class _Call:
    identity: bytes
    call_id: int
    source: str


class PendingMigrations:
    """By migration. Answers are pairs of the operator's connection and the message for it."""

    def __init__(self) -> None:
        self._calls: dict[str, _Call] = {}

    def begun(self, migration: StartMigration, identity: bytes, call_id: int) -> None:
        """A migration that an operator asked for was ordered."""
        self._calls[migration.migration_id] = _Call(identity, call_id, migration.source)

    def ended(self, report: ReportMigration) -> Iterator[Answer]:
        """Any migration has ended: who is to be told."""
        call = self._calls.pop(report.migration_id, None)
        if call is not None:
            yield call.identity, MigrateAnswer(call_id=call.call_id, report=report)

    def source_lost(self, instance_id: str) -> Iterator[Answer]:
        """A dead source does not report: who is to be told."""
        lost = [i for i, call in self._calls.items() if call.source == instance_id]
        for migration_id in lost:
            call = self._calls.pop(migration_id)
            refused = f"instance {instance_id} was lost meanwhile"
            yield call.identity, MigrateAnswer(call_id=call.call_id, refused=refused)
