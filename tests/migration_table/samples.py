"""One event of each kind, and records in any state, for tests that walk the tables."""

from __future__ import annotations

from dataclasses import replace
from typing import TypedDict

from llumsched.core.migration import events, messages
from llumsched.core.migration.destination import events as arriving
from llumsched.core.migration.destination import machine as destination
from llumsched.core.migration.destination.events import DestinationEvent, ReservationState
from llumsched.core.migration.destination.record import Reservation, ReservationOptions
from llumsched.core.migration.source import events as leaving
from llumsched.core.migration.source import machine as source
from llumsched.core.migration.source.events import MigrationState, SourceEvent
from llumsched.core.migration.source.record import Migration, MigrationOptions

MIGRATION_ID = "m"


class Ids(TypedDict):
    """Names that a command or message of one request's migration has."""

    migration_id: str
    request_id: str


IDS = Ids(migration_id=MIGRATION_ID, request_id="r")


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
        options=ReservationOptions(),
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


def source_events(migration: Migration) -> dict[type[SourceEvent], list[SourceEvent]]:
    """Events about `migration` as it stands, by type, in as many variants as guards tell apart."""
    m = migration.migration_id
    copied = migration.num_blocks_copied
    progress = [(0, 0), (0, 1), (0, 2), (0, 9), (0, 1000), (1, 0)]
    return {
        messages.BlocksReserved: [
            messages.BlocksReserved(
                migration_id=m,
                num_cached_blocks=4,
                num_full_blocks_now=4 + num_left,
                num_preemptions=num_preemptions,
            )
            for num_preemptions, num_left in progress
        ],
        messages.ReservationRejected: [messages.ReservationRejected(migration_id=m, reason="full")],
        messages.BlocksCopied: [
            messages.BlocksCopied(
                migration_id=m,
                stage=migration.stage,
                num_blocks_total=copied,
                num_full_blocks_now=copied + num_left,
                num_preemptions=num_preemptions,
            )
            for num_preemptions, num_left in progress
        ],
        leaving.RequestSuspended: [
            leaving.RequestSuspended(
                migration_id=m, num_blocks_to_copy=num_left, num_preemptions=num_preemptions
            )
            for num_preemptions, num_left in progress
        ],
        leaving.FinishedAtSource: [leaving.FinishedAtSource(migration_id=m)],
        leaving.AbortedAtSource: [leaving.AbortedAtSource(migration_id=m)],
        leaving.PreemptedAtSource: [leaving.PreemptedAtSource(migration_id=m)],
        messages.CommitAcknowledged: [messages.CommitAcknowledged(migration_id=m)],
        messages.CommitRefused: [messages.CommitRefused(migration_id=m, reason="expired")],
        events.DeadlineExpired: [
            events.DeadlineExpired(migration_id=m, state=migration.state, stage=migration.stage)
        ],
        events.PeerLost: [
            events.PeerLost(migration_id=m, reason="no route"),
            events.PeerLost(migration_id=m, reason="killed", is_dead=True),
        ],
    }


def destination_events(
    reservation: Reservation,
) -> dict[type[DestinationEvent], list[DestinationEvent]]:
    """The same of `reservation`."""
    m = reservation.migration_id
    written = reservation.num_blocks_written
    return {
        messages.ReserveBlocks: [
            messages.ReserveBlocks(migration_id=m, request_id="r", source="a")
        ],
        messages.CopyBlocks: [
            messages.CopyBlocks(
                migration_id=m, stage=reservation.stage + 1, first_block=first, num_blocks=3
            )
            for first in (written, written + 1)
        ],
        messages.CommitRequest: [
            messages.CommitRequest(migration_id=m, num_blocks=num_blocks)
            for num_blocks in (written, written + 1)
        ],
        messages.QueryCommit: [messages.QueryCommit(migration_id=m)],
        messages.ReleaseReservation: [messages.ReleaseReservation(migration_id=m)],
        messages.AbortAtDestination: [messages.AbortAtDestination(migration_id=m, request_id="r")],
        messages.CloseMigration: [messages.CloseMigration(migration_id=m)],
        arriving.BlocksAllocated: [arriving.BlocksAllocated(migration_id=m, num_cached_blocks=2)],
        arriving.AllocationFailed: [
            arriving.AllocationFailed(migration_id=m, reason="12 blocks are free")
        ],
        arriving.BlocksWritten: [
            arriving.BlocksWritten(
                migration_id=m, stage=reservation.stage, num_blocks_total=num_blocks
            )
            for num_blocks in (written, written + 3)
        ],
        arriving.RequestAdmitted: [arriving.RequestAdmitted(migration_id=m)],
        arriving.AdmissionFailed: [
            arriving.AdmissionFailed(migration_id=m, reason="the grammar refuses")
        ],
        events.DeadlineExpired: [
            events.DeadlineExpired(migration_id=m, state=reservation.state, stage=reservation.stage)
        ],
        events.PeerLost: [
            events.PeerLost(migration_id=m, reason="no route"),
            events.PeerLost(migration_id=m, reason="killed", is_dead=True),
        ],
    }
