"""The rules of a migration at its destination: what each event leads to in each state.

Guards and commands are functions of the record alone, so the table can be walked: the tests do, and
the diagram in docs/migration-protocol.md is drawn from it.
"""

from __future__ import annotations

from collections.abc import Callable

from llumsched.core.migration.destination.events import (
    EVENTS,
    AbortRequest,
    AdmissionFailed,
    AdmitRequest,
    AllocateBlocks,
    AllocationFailed,
    BlocksAllocated,
    BlocksWritten,
    DestinationCommand,
    DestinationEvent,
    FreeBlocks,
    ReceiveBlocks,
    RequestAdmitted,
    ReservationState,
)
from llumsched.core.migration.destination.record import ReleaseReason, Reservation
from llumsched.core.migration.events import DeadlineExpired, PeerLost
from llumsched.core.migration.messages import (
    AbortAtDestination,
    BlocksCopied,
    BlocksReserved,
    CloseMigration,
    CommitAcknowledged,
    CommitRefused,
    CommitRequest,
    CopyBlocks,
    QueryCommit,
    ReleaseReservation,
    ReservationRejected,
    ReserveBlocks,
)
from llumsched.core.migration.table import Rule, TransitionTable

# Guards.


def in_step(reservation: Reservation) -> bool:
    return reservation.first_block == reservation.num_blocks_written


def complete(reservation: Reservation) -> bool:
    return reservation.num_blocks_written >= reservation.num_commit_blocks


def source_is_dead(reservation: Reservation) -> bool:
    return reservation.source_is_dead


# Commands.


def allocate_blocks(reservation: Reservation) -> DestinationCommand:
    return AllocateBlocks(migration_id=reservation.migration_id, request_id=reservation.request_id)


def receive_blocks(reservation: Reservation) -> DestinationCommand:
    return ReceiveBlocks(
        migration_id=reservation.migration_id,
        request_id=reservation.request_id,
        stage=reservation.stage,
        first_block=reservation.first_block,
        num_blocks=reservation.num_stage_blocks,
    )


def admit_request(reservation: Reservation) -> DestinationCommand:
    return AdmitRequest(migration_id=reservation.migration_id, request_id=reservation.request_id)


def free_blocks(reservation: Reservation) -> DestinationCommand:
    return FreeBlocks(migration_id=reservation.migration_id, request_id=reservation.request_id)


def abort_request(reservation: Reservation) -> DestinationCommand:
    return AbortRequest(migration_id=reservation.migration_id, request_id=reservation.request_id)


def confirm_reservation(reservation: Reservation) -> DestinationCommand:
    return BlocksReserved(
        migration_id=reservation.migration_id, num_cached_blocks=reservation.num_blocks_written
    )


def reject_reservation(reservation: Reservation) -> DestinationCommand:
    return ReservationRejected(migration_id=reservation.migration_id, reason=reservation.reason)


def confirm_copy(reservation: Reservation) -> DestinationCommand:
    return BlocksCopied(
        migration_id=reservation.migration_id,
        stage=reservation.stage,
        num_blocks_total=reservation.num_blocks_written,
    )


def acknowledge_commit(reservation: Reservation) -> DestinationCommand:
    return CommitAcknowledged(migration_id=reservation.migration_id)


def refuse_commit(reservation: Reservation) -> DestinationCommand:
    return CommitRefused(migration_id=reservation.migration_id, reason=reservation.reason)


# The table.

DestinationRule = Rule[ReservationState, Reservation, DestinationCommand]
Command = Callable[[Reservation], DestinationCommand]

ABSENT = ReservationState.ABSENT
ALLOCATING = ReservationState.ALLOCATING
RESERVED = ReservationState.RESERVED
RECEIVING = ReservationState.RECEIVING
COMMIT_PENDING = ReservationState.COMMIT_PENDING
ADMITTING = ReservationState.ADMITTING
COMMITTED = ReservationState.COMMITTED
RELEASED = ReservationState.RELEASED


def _go(
    to: ReservationState, *do: Command, when: Callable[[Reservation], bool] | None = None
) -> DestinationRule:
    return Rule(to=to, do=do, when=when)


def _release(
    reason: ReleaseReason, *do: Command, when: Callable[[Reservation], bool] | None = None
) -> DestinationRule:
    return Rule(to=RELEASED, do=do, when=when, reason=reason)


_RULES: dict[tuple[ReservationState, type[DestinationEvent]], tuple[DestinationRule, ...]] = {
    # Nothing is held. What comes before its ReserveBlocks has overtaken it, so that is refused too.
    (ABSENT, ReserveBlocks): (_go(ALLOCATING, allocate_blocks),),
    (ABSENT, CopyBlocks): (_release(ReleaseReason.OUT_OF_STEP, reject_reservation),),
    (ABSENT, CommitRequest): (_release(ReleaseReason.COMMIT_UNKNOWN, refuse_commit),),
    (ABSENT, QueryCommit): (_release(ReleaseReason.COMMIT_UNKNOWN, refuse_commit),),
    (ABSENT, ReleaseReservation): (_release(ReleaseReason.RELEASED_BY_SOURCE),),
    (ABSENT, AbortAtDestination): (_go(ABSENT, abort_request),),
    # Blocks are held, or asked for.
    (ALLOCATING, BlocksAllocated): (_go(RESERVED, confirm_reservation),),
    (ALLOCATING, AllocationFailed): (_release(ReleaseReason.NO_ROOM, reject_reservation),),
    (ALLOCATING, CommitRequest): (
        _release(ReleaseReason.COMMIT_INCOMPLETE, free_blocks, refuse_commit),
    ),
    **{
        (state, CopyBlocks): (
            _go(RECEIVING, receive_blocks, when=in_step),
            _release(ReleaseReason.OUT_OF_STEP, free_blocks, reject_reservation),
        )
        for state in (RESERVED, RECEIVING)
    },
    (RECEIVING, BlocksWritten): (_go(RECEIVING, confirm_copy),),
    (RECEIVING, AllocationFailed): (
        _release(ReleaseReason.NO_ROOM, free_blocks, reject_reservation),
    ),
    **{
        (state, CommitRequest): (
            _go(ADMITTING, admit_request, when=complete),
            _go(COMMIT_PENDING),
        )
        for state in (RESERVED, RECEIVING)
    },
    **{
        (state, event): (_release(reason, free_blocks, *do),)
        for state in (ALLOCATING, RESERVED, RECEIVING)
        for event, reason, do in (
            (QueryCommit, ReleaseReason.NOT_COMMITTED_WHEN_ASKED, (refuse_commit,)),
            (ReleaseReservation, ReleaseReason.RELEASED_BY_SOURCE, ()),
            (DeadlineExpired, ReleaseReason.EXPIRED, (reject_reservation,)),
            (PeerLost, ReleaseReason.SOURCE_LOST, ()),
        )
    },
    # The commit comes along with the last stage, so it may be here first. Until that stage is
    # complete nothing is promised.
    (COMMIT_PENDING, CopyBlocks): (
        _go(COMMIT_PENDING, receive_blocks, when=in_step),
        _release(ReleaseReason.OUT_OF_STEP, free_blocks, refuse_commit),
    ),
    (COMMIT_PENDING, BlocksWritten): (
        _go(ADMITTING, admit_request, when=complete),
        _go(COMMIT_PENDING),
    ),
    **{
        (COMMIT_PENDING, event): (_release(reason, free_blocks, *do),)
        for event, reason, do in (
            (AllocationFailed, ReleaseReason.NO_ROOM, (refuse_commit,)),
            (QueryCommit, ReleaseReason.NOT_COMMITTED_WHEN_ASKED, (refuse_commit,)),
            (DeadlineExpired, ReleaseReason.EXPIRED, (refuse_commit,)),
            (PeerLost, ReleaseReason.SOURCE_LOST, ()),
        )
    },
    # The engine is at it; whatever was asked meanwhile is answered by the outcome.
    (ADMITTING, RequestAdmitted): (
        _release(ReleaseReason.CLOSED, when=source_is_dead),
        _go(COMMITTED, acknowledge_commit),
    ),
    (ADMITTING, AdmissionFailed): (
        _release(ReleaseReason.ADMISSION_FAILED, free_blocks, refuse_commit),
    ),
    (ADMITTING, PeerLost): (_go(ADMITTING),),
    # The request runs here. The record answers for it until nobody can ask any more.
    (COMMITTED, CommitRequest): (_go(COMMITTED, acknowledge_commit),),
    (COMMITTED, QueryCommit): (_go(COMMITTED, acknowledge_commit),),
    (COMMITTED, DeadlineExpired): (_go(COMMITTED, acknowledge_commit),),
    (COMMITTED, AbortAtDestination): (_release(ReleaseReason.CLOSED, abort_request),),
    (COMMITTED, CloseMigration): (_release(ReleaseReason.CLOSED),),
    (COMMITTED, PeerLost): (
        _release(ReleaseReason.CLOSED, when=source_is_dead),
        _go(COMMITTED),
    ),
    # A tombstone.
    (RELEASED, ReserveBlocks): (_go(RELEASED, reject_reservation),),
    (RELEASED, CopyBlocks): (_go(RELEASED, reject_reservation),),
    (RELEASED, CommitRequest): (_go(RELEASED, refuse_commit),),
    (RELEASED, QueryCommit): (_go(RELEASED, refuse_commit),),
    (RELEASED, AbortAtDestination): (_go(RELEASED, abort_request),),
    (RELEASED, DeadlineExpired): (_go(ABSENT),),
}

_LOCAL = (BlocksAllocated, AllocationFailed, BlocksWritten)

_IGNORED: frozenset[tuple[ReservationState, type[DestinationEvent]]] = frozenset(
    {
        # Doubled on the link.
        *(
            (state, ReserveBlocks)
            for state in (ALLOCATING, RESERVED, RECEIVING, COMMIT_PENDING, ADMITTING, COMMITTED)
        ),
        (COMMIT_PENDING, CommitRequest),
        *((state, CopyBlocks) for state in (ADMITTING, COMMITTED)),
        *((state, CloseMigration) for state in (RELEASED, ABSENT)),
        (RELEASED, ReleaseReservation),
        # The stage of a reservation that was lost: its ReserveBlocks has come again, later.
        (ALLOCATING, CopyBlocks),
        # The outcome of the admission is the answer.
        (ADMITTING, CommitRequest),
        (ADMITTING, QueryCommit),
        # The engine finished what the release came too late for; FreeBlocks follows it.
        *((state, event) for state in (RELEASED, ABSENT) for event in _LOCAL),
        # Nothing is at stake here any more.
        *((state, PeerLost) for state in (RELEASED, ABSENT)),
    }
)

_ILLEGAL: frozenset[tuple[ReservationState, type[DestinationEvent]]] = frozenset(
    {
        # The source gives up or commits, never both.
        *((state, ReleaseReservation) for state in (COMMIT_PENDING, ADMITTING, COMMITTED)),
        # The source speaks of a commit that was not acknowledged.
        *(
            (state, event)
            for state in (ALLOCATING, RESERVED, RECEIVING, COMMIT_PENDING, ADMITTING)
            for event in (AbortAtDestination, CloseMigration)
        ),
        # The engine answers what it was not asked, or twice.
        *(
            (state, BlocksAllocated)
            for state in (RESERVED, RECEIVING, COMMIT_PENDING, ADMITTING, COMMITTED)
        ),
        *((state, AllocationFailed) for state in (RESERVED, ADMITTING, COMMITTED)),
        *((state, BlocksWritten) for state in (ALLOCATING, RESERVED, ADMITTING, COMMITTED)),
        *(
            (state, event)
            for state in ReservationState
            if state is not ADMITTING
            for event in (RequestAdmitted, AdmissionFailed)
        ),
        # These states have no deadline.
        *((state, DeadlineExpired) for state in (ABSENT, ADMITTING)),
    }
)

TABLE: TransitionTable[ReservationState, Reservation, DestinationEvent, DestinationCommand] = (
    TransitionTable(
        states=ReservationState, events=EVENTS, rules=_RULES, ignored=_IGNORED, illegal=_ILLEGAL
    )
)
