"""One event of each kind, and records in any state, for tests that walk the tables."""

from __future__ import annotations

from dataclasses import replace

from llumsched.core.migration.destination import machine as destination
from llumsched.core.migration.destination.machine import (
    Reservation,
    ReservationEvent,
    ReservationState,
)
from llumsched.core.migration.source import machine as source
from llumsched.core.migration.source.machine import (
    Migration,
    MigrationEvent,
    MigrationOptions,
    MigrationState,
)

MIGRATION_ID = "m"


def make_migration(
    state: MigrationState = MigrationState.RESERVING,
    *,
    options: MigrationOptions | None = None,
    stage: int = 1,
    num_stage_blocks: int = 10,
    num_blocks_copied: int = 10,
    abort_requested: bool = False,
    destination_is_dead: bool = False,
) -> Migration:
    migration, _ = source.start(
        migration_id=MIGRATION_ID,
        request_id="r",
        source="a",
        destination="b",
        num_preemptions=0,
        options=options,
    )
    return replace(
        migration,
        state=state,
        stage=stage,
        num_stage_blocks=num_stage_blocks,
        num_blocks_copied=num_blocks_copied,
        num_copyable_blocks=num_blocks_copied,
        abort_requested=abort_requested,
        destination_is_dead=destination_is_dead,
    )


def make_reservation(
    state: ReservationState,
    *,
    stage: int = 1,
    num_blocks_written: int = 10,
    source_is_dead: bool = False,
) -> Reservation:
    if state is ReservationState.ABSENT:
        return destination.absent(MIGRATION_ID)
    return Reservation(
        migration_id=MIGRATION_ID,
        request_id="r",
        source="a",
        state=state,
        stage=stage,
        num_blocks_written=num_blocks_written,
        num_commit_blocks=(
            num_blocks_written + 3 if state is ReservationState.COMMIT_PENDING else 0
        ),
        source_is_dead=source_is_dead,
    )


def source_events(migration: Migration) -> dict[type[MigrationEvent], list[MigrationEvent]]:
    """Events about `migration` as it stands, by type, in as many variants as guards tell apart."""
    m = migration.migration_id
    copied = migration.num_blocks_copied
    progress = [(0, 0), (0, 1), (0, 2), (0, 9), (0, 1000), (1, 0)]
    return {
        source.BlocksReserved: [
            source.BlocksReserved(
                migration_id=m,
                num_cached_blocks=4,
                num_full_blocks_now=4 + num_left,
                num_preemptions=num_preemptions,
            )
            for num_preemptions, num_left in progress
        ],
        source.ReservationRejected: [source.ReservationRejected(migration_id=m, reason="full")],
        source.BlocksCopied: [
            source.BlocksCopied(
                migration_id=m,
                stage=migration.stage,
                num_blocks_total=copied,
                num_full_blocks_now=copied + num_left,
                num_preemptions=num_preemptions,
            )
            for num_preemptions, num_left in progress
        ],
        source.RequestSuspended: [
            source.RequestSuspended(
                migration_id=m, num_blocks_to_copy=num_left, num_preemptions=num_preemptions
            )
            for num_preemptions, num_left in progress
        ],
        source.RequestFinished: [source.RequestFinished(migration_id=m)],
        source.RequestAborted: [source.RequestAborted(migration_id=m)],
        source.RequestPreempted: [source.RequestPreempted(migration_id=m)],
        source.CommitAcknowledged: [source.CommitAcknowledged(migration_id=m)],
        source.CommitRefused: [source.CommitRefused(migration_id=m, reason="expired")],
        source.DeadlineExpired: [
            source.DeadlineExpired(migration_id=m, state=migration.state, stage=migration.stage)
        ],
        source.PeerLost: [
            source.PeerLost(migration_id=m, reason="no route"),
            source.PeerLost(migration_id=m, reason="killed", is_dead=True),
        ],
    }


def destination_events(
    reservation: Reservation,
) -> dict[type[ReservationEvent], list[ReservationEvent]]:
    """The same of `reservation`."""
    m = reservation.migration_id
    written = reservation.num_blocks_written
    return {
        destination.ReservationRequested: [
            destination.ReservationRequested(migration_id=m, request_id="r", source="a")
        ],
        destination.StageAnnounced: [
            destination.StageAnnounced(
                migration_id=m, stage=reservation.stage + 1, first_block=first, num_blocks=3
            )
            for first in (written, written + 1)
        ],
        destination.CommitRequested: [
            destination.CommitRequested(migration_id=m, num_blocks=num_blocks)
            for num_blocks in (written, written + 1)
        ],
        destination.CommitQueried: [destination.CommitQueried(migration_id=m)],
        destination.ReleaseRequested: [destination.ReleaseRequested(migration_id=m)],
        destination.AbortRequested: [destination.AbortRequested(migration_id=m, request_id="r")],
        destination.MigrationClosed: [destination.MigrationClosed(migration_id=m)],
        destination.BlocksAllocated: [
            destination.BlocksAllocated(migration_id=m, num_cached_blocks=2)
        ],
        destination.AllocationFailed: [
            destination.AllocationFailed(migration_id=m, reason="12 blocks are free")
        ],
        destination.BlocksWritten: [
            destination.BlocksWritten(
                migration_id=m, stage=reservation.stage, num_blocks_total=num_blocks
            )
            for num_blocks in (written, written + 3)
        ],
        destination.RequestAdmitted: [destination.RequestAdmitted(migration_id=m)],
        destination.AdmissionFailed: [
            destination.AdmissionFailed(migration_id=m, reason="the grammar refuses")
        ],
        destination.ReservationExpired: [
            destination.ReservationExpired(
                migration_id=m, state=reservation.state, stage=reservation.stage
            )
        ],
        destination.SourceLost: [
            destination.SourceLost(migration_id=m, reason="no route"),
            destination.SourceLost(migration_id=m, reason="killed", is_dead=True),
        ],
    }
