"""Live migration seen from the destination: a reservation and its transition table.

The host keeps one Reservation for each migration id, starting from `absent(...)`, and forgets it
when it is ABSENT again. The destination promises nothing until CommitRequest has come, and all
blocks with it; from then on its answer is final. It stays COMMITTED until the source has said that
it knows, so a doubled commit or a late query is acknowledged again; and what it has not committed
when it is asked, it never will. A source that dies or falls silent before that costs a reservation
for its deadline, no more.

Invariant: the reservation's blocks are freed, or are the admitted request's, in every state from
which nothing else is waited for. Knows no clock, no engine, no link.
"""

from __future__ import annotations

from dataclasses import replace

from llumsched.core.migration.destination.events import (
    BlocksAllocated,
    BlocksWritten,
    DestinationCommand,
    DestinationEvent,
    ReservationState,
)
from llumsched.core.migration.destination.record import (
    ReleaseReason,
    Reservation,
    ReservationOptions,
)
from llumsched.core.migration.destination.rules import TABLE, DestinationRule
from llumsched.core.migration.events import DeadlineExpired, PeerLost
from llumsched.core.migration.messages import (
    AbortAtDestination,
    CommitRequest,
    CopyBlocks,
    ReserveBlocks,
)


def absent(migration_id: str, options: ReservationOptions | None = None) -> Reservation:
    """The reservation of a migration that was never heard of."""
    return Reservation(migration_id=migration_id, options=options or ReservationOptions())


def is_current(reservation: Reservation, event: DestinationEvent) -> bool:
    """True if `event` is about this reservation as it stands; the host drops it otherwise."""
    if event.migration_id != reservation.migration_id:
        return False
    match event:
        case CopyBlocks():
            return event.stage == reservation.stage + 1
        case BlocksWritten():
            return event.stage == reservation.stage
        case DeadlineExpired():
            return (event.state, event.stage) == (reservation.state, reservation.stage)
    return True


def wait(reservation: Reservation) -> tuple[float, DeadlineExpired] | None:
    """How many seconds to wait in this state, and for what event; None if there is no limit."""
    options = reservation.options
    match reservation.state:
        case ReservationState.ABSENT | ReservationState.ADMITTING:
            return None
        case ReservationState.COMMITTED:
            timeout_s = options.acknowledge_interval_s
        case ReservationState.RELEASED:
            timeout_s = options.tombstone_s
        case _:
            timeout_s = options.reservation_timeout_s
    expired = DeadlineExpired(
        migration_id=reservation.migration_id, state=reservation.state, stage=reservation.stage
    )
    return timeout_s, expired


def advance(
    reservation: Reservation, event: DestinationEvent
) -> tuple[Reservation, tuple[DestinationCommand, ...]]:
    """The reservation after `event`, and what is to be done about it, in order.

    Raises IllegalTransition for an event that cannot occur in this state.
    """
    informed = _absorb(reservation, event)
    rule = TABLE.choose(reservation.state, event, informed)
    if rule is None:
        return reservation, ()
    entered = _enter(informed, rule, event)
    return entered, tuple(command(entered) for command in rule.do)


def _absorb(reservation: Reservation, event: DestinationEvent) -> Reservation:
    """Take over the facts that an event states, before any rule is chosen."""
    match event:
        case ReserveBlocks():
            return replace(reservation, request_id=event.request_id, source=event.source)
        case CopyBlocks():
            return replace(
                reservation,
                stage=event.stage,
                first_block=event.first_block,
                num_stage_blocks=event.num_blocks,
            )
        case CommitRequest():
            return replace(reservation, num_commit_blocks=event.num_blocks)
        case AbortAtDestination():
            return replace(reservation, request_id=event.request_id)
        case BlocksAllocated():
            return replace(reservation, num_blocks_written=event.num_cached_blocks)
        case BlocksWritten():
            return replace(reservation, num_blocks_written=event.num_blocks_total)
        case PeerLost(is_dead=True):
            return replace(reservation, source_is_dead=True)
    return reservation


def _enter(reservation: Reservation, rule: DestinationRule, event: DestinationEvent) -> Reservation:
    if rule.reason is None:
        return replace(reservation, state=rule.to)
    assert isinstance(rule.reason, ReleaseReason)
    return replace(
        reservation,
        state=rule.to,
        release_reason=rule.reason,
        release_detail=getattr(event, "reason", ""),
    )
