"""Live migration seen from the destination: a reservation and its transition table.

The host keeps one Reservation for each migration id, starting from `absent(...)`, and forgets it
when it is ABSENT again. The destination promises nothing until CommitRequested has come, and all
blocks with it; from then on its answer is final. It stays COMMITTED until the source has said that
it knows, so a doubled commit or a late query is acknowledged again; and what it has not committed
when it is asked, it never will. A source that dies or falls silent before that costs a reservation
for its deadline, no more.

Invariant: the reservation's blocks are freed, or are the admitted request's, in every state from
which nothing else is waited for. Knows no clock, no engine, no link.
"""

from __future__ import annotations

from dataclasses import replace

from llumsched.core.migration.destination.messages import (
    EVENTS,
    AbortRequest,
    AbortRequested,
    AcknowledgeCommit,
    AdmissionFailed,
    AdmitRequest,
    AllocateBlocks,
    AllocationFailed,
    BlocksAllocated,
    BlocksWritten,
    CommitQueried,
    CommitRequested,
    ConfirmCopy,
    ConfirmReservation,
    FreeBlocks,
    MigrationClosed,
    ReceiveBlocks,
    RefuseCommit,
    RejectReservation,
    ReleaseRequested,
    RequestAdmitted,
    ReservationCommand,
    ReservationEvent,
    ReservationExpired,
    ReservationRequested,
    ReservationState,
    SourceLost,
    StageAnnounced,
)
from llumsched.core.migration.destination.record import (
    ReleaseReason,
    Reservation,
    ReservationOptions,
)
from llumsched.core.migration.destination.rules import TABLE, DestinationRule
from llumsched.core.migration.table import IllegalTransition

__all__ = [
    "EVENTS",
    "TABLE",
    "AbortRequest",
    "AbortRequested",
    "AcknowledgeCommit",
    "AdmissionFailed",
    "AdmitRequest",
    "AllocateBlocks",
    "AllocationFailed",
    "BlocksAllocated",
    "BlocksWritten",
    "CommitQueried",
    "CommitRequested",
    "ConfirmCopy",
    "ConfirmReservation",
    "FreeBlocks",
    "IllegalTransition",
    "MigrationClosed",
    "ReceiveBlocks",
    "RefuseCommit",
    "RejectReservation",
    "ReleaseReason",
    "ReleaseRequested",
    "RequestAdmitted",
    "Reservation",
    "ReservationCommand",
    "ReservationEvent",
    "ReservationExpired",
    "ReservationOptions",
    "ReservationRequested",
    "ReservationState",
    "SourceLost",
    "StageAnnounced",
    "absent",
    "advance",
    "is_current",
    "restarts_timer",
    "timeout_s",
]


def absent(migration_id: str) -> Reservation:
    return Reservation(migration_id=migration_id)


def is_current(reservation: Reservation, event: ReservationEvent) -> bool:
    """True if `event` is about this reservation as it stands; the host drops it otherwise."""
    if event.migration_id != reservation.migration_id:
        return False
    match event:
        case StageAnnounced():
            return event.stage == reservation.stage + 1
        case BlocksWritten():
            return event.stage == reservation.stage
        case ReservationExpired():
            return (event.state, event.stage) == (reservation.state, reservation.stage)
    return True


def timeout_s(reservation: Reservation, options: ReservationOptions) -> float | None:
    """How long to wait before ReservationExpired, from when `restarts_timer` says so; None if
    there is no limit."""
    match reservation.state:
        case (
            ReservationState.ALLOCATING
            | ReservationState.RESERVED
            | ReservationState.RECEIVING
            | ReservationState.COMMIT_PENDING
        ):
            return options.reservation_timeout_s
        case ReservationState.COMMITTED:
            return options.acknowledge_interval_s
        case ReservationState.RELEASED:
            return options.tombstone_s
    return None


def restarts_timer(before: Reservation, event: ReservationEvent, after: Reservation) -> bool:
    """True if the wait begins anew: state or stage changed, or it is over and changed neither."""
    moved = (after.state, after.stage) != (before.state, before.stage)
    return moved or isinstance(event, ReservationExpired)


def advance(
    reservation: Reservation, event: ReservationEvent
) -> tuple[Reservation, tuple[ReservationCommand, ...]]:
    """The reservation after `event`, and what is to be done about it, in order.

    Raises IllegalTransition for an event that cannot occur in this state.
    """
    informed = _absorb(reservation, event)
    rule = TABLE.choose(reservation.state, event, informed)
    if rule is None:
        return reservation, ()
    entered = _enter(informed, rule, event)
    return entered, tuple(command(entered) for command in rule.do)


def _absorb(reservation: Reservation, event: ReservationEvent) -> Reservation:
    """Take over the facts that an event states, before any rule is chosen."""
    match event:
        case ReservationRequested():
            return replace(reservation, request_id=event.request_id, source=event.source)
        case StageAnnounced():
            return replace(
                reservation,
                stage=event.stage,
                first_block=event.first_block,
                num_stage_blocks=event.num_blocks,
            )
        case CommitRequested():
            return replace(reservation, num_commit_blocks=event.num_blocks)
        case AbortRequested():
            return replace(reservation, request_id=event.request_id)
        case BlocksAllocated():
            return replace(reservation, num_blocks_written=event.num_cached_blocks)
        case BlocksWritten():
            return replace(reservation, num_blocks_written=event.num_blocks_total)
        case SourceLost(is_dead=True):
            return replace(reservation, source_is_dead=True)
    return reservation


def _enter(reservation: Reservation, rule: DestinationRule, event: ReservationEvent) -> Reservation:
    if rule.reason is None:
        return replace(reservation, state=rule.to)
    assert isinstance(rule.reason, ReleaseReason)
    return replace(
        reservation,
        state=rule.to,
        release_reason=rule.reason,
        release_detail=getattr(event, "reason", ""),
    )
