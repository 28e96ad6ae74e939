"""The source's report to the scheduler of a migration that is over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llumsched.core.events import MigrationOutcome
from llumsched.wire.control import MigrationStatistics, ReportMigration

if TYPE_CHECKING:
    from llumsched.migration.source import OutgoingMigration


def report_of(
    outgoing: OutgoingMigration,
    outcome: MigrationOutcome,
    reason: str = "",
    *,
    cause: str = "",
    statistics: MigrationStatistics | None = None,
) -> ReportMigration:
    """Report to the scheduler."""
    migration = outgoing.record
    return ReportMigration(
        migration_id=migration.migration_id,
        request_id=migration.request_id,
        source=migration.source,
        destination=migration.destination,
        outcome=outcome.value,
        reason=reason,
        cause=cause,
        statistics=statistics,
        phase=outgoing.phase,
        has_ended=outgoing.has_ended,
    )
