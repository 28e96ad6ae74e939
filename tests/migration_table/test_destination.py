"""The destination's side, event by event."""

from __future__ import annotations

import pytest

from llumsched.core.migration.destination.events import (
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
from llumsched.core.migration.destination.machine import absent, advance, is_current
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
from tests.migration_table.samples import IDS, MIGRATION_ID, make_reservation

REQUESTED = ReserveBlocks(**IDS, source="a")
QUERIED = QueryCommit(migration_id=MIGRATION_ID)
RELEASE = ReleaseReservation(migration_id=MIGRATION_ID)
HOLDING = (
    ReservationState.ALLOCATING,
    ReservationState.RESERVED,
    ReservationState.RECEIVING,
    ReservationState.COMMIT_PENDING,
)


def announced(stage: int, first: int, num: int) -> CopyBlocks:
    return CopyBlocks(migration_id=MIGRATION_ID, stage=stage, first_block=first, num_blocks=num)


def written(stage: int, num_total: int) -> BlocksWritten:
    return BlocksWritten(migration_id=MIGRATION_ID, stage=stage, num_blocks_total=num_total)


def commit(num_blocks: int) -> CommitRequest:
    return CommitRequest(migration_id=MIGRATION_ID, num_blocks=num_blocks)


def refusal(reason: ReleaseReason, detail: str = "") -> CommitRefused:
    return CommitRefused(
        migration_id=MIGRATION_ID, reason=f"{reason}: {detail}" if detail else reason
    )


def test_a_reservation_that_is_committed() -> None:
    reservation = absent(MIGRATION_ID)
    steps: list[tuple[DestinationEvent, ReservationState, tuple[DestinationCommand, ...]]] = [
        (REQUESTED, ReservationState.ALLOCATING, (AllocateBlocks(**IDS),)),
        (
            BlocksAllocated(migration_id=MIGRATION_ID, num_cached_blocks=2),
            ReservationState.RESERVED,
            (BlocksReserved(migration_id=MIGRATION_ID, num_cached_blocks=2),),
        ),
        (
            announced(1, 2, 88),
            ReservationState.RECEIVING,
            (ReceiveBlocks(**IDS, stage=1, first_block=2, num_blocks=88),),
        ),
        (
            written(1, 90),
            ReservationState.RECEIVING,
            (BlocksCopied(migration_id=MIGRATION_ID, stage=1, num_blocks_total=90),),
        ),
        (
            announced(2, 90, 1),
            ReservationState.RECEIVING,
            (ReceiveBlocks(**IDS, stage=2, first_block=90, num_blocks=1),),
        ),
        (
            written(2, 91),
            ReservationState.RECEIVING,
            (BlocksCopied(migration_id=MIGRATION_ID, stage=2, num_blocks_total=91),),
        ),
        (commit(91), ReservationState.ADMITTING, (AdmitRequest(**IDS),)),
        (
            RequestAdmitted(migration_id=MIGRATION_ID),
            ReservationState.COMMITTED,
            (CommitAcknowledged(migration_id=MIGRATION_ID),),
        ),
        (CloseMigration(migration_id=MIGRATION_ID), ReservationState.RELEASED, ()),
        (
            DeadlineExpired(migration_id=MIGRATION_ID, state=ReservationState.RELEASED, stage=2),
            ReservationState.ABSENT,
            (),
        ),
    ]
    for event, state, commands in steps:
        assert is_current(reservation, event)
        reservation, asked = advance(reservation, event)
        assert (reservation.state, asked) == (state, commands)


# The commit.


def test_a_doubled_commit_is_acknowledged_again_and_admitted_once() -> None:
    reservation, _ = advance(make_reservation(ReservationState.RECEIVING), commit(10))
    assert advance(reservation, commit(10)) == (reservation, ())
    reservation, _ = advance(reservation, RequestAdmitted(migration_id=MIGRATION_ID))
    for again in (commit(10), QUERIED, commit(10)):
        reservation, commands = advance(reservation, again)
        assert commands == (CommitAcknowledged(migration_id=MIGRATION_ID),)


@pytest.mark.parametrize("state", HOLDING)
def test_a_query_ends_what_is_not_committed_so_the_late_commit_is_refused(
    state: ReservationState,
) -> None:
    reservation, commands = advance(make_reservation(state), QUERIED)
    refused = refusal(ReleaseReason.NOT_COMMITTED_WHEN_ASKED)
    assert commands == (FreeBlocks(**IDS), refused)
    for late in (commit(10), QUERIED):
        reservation, commands = advance(reservation, late)
        assert (reservation.state, commands) == (ReservationState.RELEASED, (refused,))


@pytest.mark.parametrize("event", [commit(1), QUERIED], ids=["commit", "query"])
def test_what_was_never_heard_of_is_refused_and_stays_refused(event: DestinationEvent) -> None:
    reservation, commands = advance(absent(MIGRATION_ID), event)
    assert [type(c) for c in commands] == [CommitRefused]
    _, commands = advance(reservation, REQUESTED)
    assert [type(c) for c in commands] == [ReservationRejected]


def test_a_release_that_overtakes_its_reservation_is_remembered() -> None:
    reservation, commands = advance(absent(MIGRATION_ID), RELEASE)
    assert commands == ()
    _, commands = advance(reservation, REQUESTED)
    assert commands == (
        ReservationRejected(migration_id=MIGRATION_ID, reason=ReleaseReason.RELEASED_BY_SOURCE),
    )


def test_a_query_during_the_admission_is_answered_by_its_outcome() -> None:
    admitting = make_reservation(ReservationState.ADMITTING)
    assert advance(admitting, QUERIED) == (admitting, ())
    _, commands = advance(admitting, RequestAdmitted(migration_id=MIGRATION_ID))
    assert commands == (CommitAcknowledged(migration_id=MIGRATION_ID),)
    failure = AdmissionFailed(migration_id=MIGRATION_ID, reason="the grammar refuses")
    _, commands = advance(admitting, failure)
    assert commands == (
        FreeBlocks(**IDS),
        refusal(ReleaseReason.ADMISSION_FAILED, "the grammar refuses"),
    )


@pytest.mark.parametrize("commit_is_first", [True, False], ids=["commit first", "stage first"])
def test_a_commit_of_more_than_was_written_waits_for_the_rest(commit_is_first: bool) -> None:
    reservation = make_reservation(ReservationState.RECEIVING, num_blocks_written=10)
    both = [commit(11), announced(2, 10, 1)]
    for event in both if commit_is_first else reversed(both):
        reservation, commands = advance(reservation, event)
        assert not any(isinstance(c, AdmitRequest) for c in commands)
    assert reservation.state is ReservationState.COMMIT_PENDING
    reservation, commands = advance(reservation, written(2, 11))
    assert (reservation.state, commands) == (ReservationState.ADMITTING, (AdmitRequest(**IDS),))


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (AllocationFailed(migration_id=MIGRATION_ID, reason="full"), "no_room: full"),
        (announced(2, 11, 1), "out_of_step"),
        (QUERIED, "not_committed_when_asked"),
        (
            DeadlineExpired(
                migration_id=MIGRATION_ID, state=ReservationState.COMMIT_PENDING, stage=1
            ),
            "expired",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_commit_whose_blocks_do_not_come_is_refused(event: DestinationEvent, reason: str) -> None:
    pending = make_reservation(ReservationState.COMMIT_PENDING)
    reservation, commands = advance(pending, event)
    refused = CommitRefused(migration_id=MIGRATION_ID, reason=reason)
    assert commands == (FreeBlocks(**IDS), refused)
    assert advance(reservation, QUERIED)[1] == (refused,)


def test_a_source_that_is_lost_before_its_last_blocks_costs_a_reservation() -> None:
    lost = PeerLost(migration_id=MIGRATION_ID, reason="killed", is_dead=True)
    reservation, commands = advance(make_reservation(ReservationState.COMMIT_PENDING), lost)
    assert (reservation.state, commands) == (ReservationState.RELEASED, (FreeBlocks(**IDS),))


def test_a_commit_is_acknowledged_until_the_source_has_heard() -> None:
    committed = make_reservation(ReservationState.COMMITTED)
    for _ in range(2):
        event = DeadlineExpired(
            migration_id=MIGRATION_ID, state=ReservationState.COMMITTED, stage=1
        )
        assert advance(committed, event) == (
            committed,
            (CommitAcknowledged(migration_id=MIGRATION_ID),),
        )


# Blocks.


def test_a_destination_without_room_says_so() -> None:
    failure = AllocationFailed(migration_id=MIGRATION_ID, reason="2 blocks are free")
    rejected = ReservationRejected(migration_id=MIGRATION_ID, reason="no_room: 2 blocks are free")
    _, commands = advance(make_reservation(ReservationState.ALLOCATING), failure)
    assert commands == (rejected,)
    _, commands = advance(make_reservation(ReservationState.RECEIVING), failure)
    assert commands == (FreeBlocks(**IDS), rejected)


def test_a_stage_that_leaves_a_gap_ends_the_reservation() -> None:
    _, commands = advance(
        make_reservation(ReservationState.RECEIVING, stage=1, num_blocks_written=10),
        announced(2, 11, 1),
    )
    assert commands == (
        FreeBlocks(**IDS),
        ReservationRejected(migration_id=MIGRATION_ID, reason=ReleaseReason.OUT_OF_STEP),
    )


@pytest.mark.parametrize("state", HOLDING[:-1])
def test_a_silent_source_costs_a_reservation_for_its_deadline(state: ReservationState) -> None:
    reservation = make_reservation(state)
    event = DeadlineExpired(migration_id=MIGRATION_ID, state=state, stage=1)
    reservation, commands = advance(reservation, event)
    assert commands == (
        FreeBlocks(**IDS),
        ReservationRejected(migration_id=MIGRATION_ID, reason=ReleaseReason.EXPIRED),
    )


@pytest.mark.parametrize("is_dead", [False, True])
@pytest.mark.parametrize("state", HOLDING)
def test_a_lost_source_frees_the_reservation_at_once(
    state: ReservationState, is_dead: bool
) -> None:
    event = PeerLost(migration_id=MIGRATION_ID, reason="no route", is_dead=is_dead)
    assert advance(make_reservation(state), event)[1] == (FreeBlocks(**IDS),)


# What remains.


def test_the_outcome_is_remembered_until_nobody_can_ask() -> None:
    committed = make_reservation(ReservationState.COMMITTED)
    unreachable = PeerLost(migration_id=MIGRATION_ID, reason="no route")
    committed, _ = advance(committed, unreachable)
    assert committed.state is ReservationState.COMMITTED
    assert not committed.may_move_on
    dead = PeerLost(migration_id=MIGRATION_ID, reason="killed", is_dead=True)
    for end in (dead, CloseMigration(migration_id=MIGRATION_ID)):
        released, commands = advance(committed, end)
        assert (released.state, released.may_move_on, commands) == (
            ReservationState.RELEASED,
            True,
            (),
        )


def test_a_source_that_died_during_the_admission_leaves_no_record_behind() -> None:
    dead = PeerLost(migration_id=MIGRATION_ID, reason="killed", is_dead=True)
    reservation, _ = advance(make_reservation(ReservationState.ADMITTING), dead)
    reservation, commands = advance(reservation, RequestAdmitted(migration_id=MIGRATION_ID))
    assert (reservation.state, commands) == (ReservationState.RELEASED, ())


@pytest.mark.parametrize(
    "reservation",
    [
        make_reservation(ReservationState.COMMITTED),
        make_reservation(ReservationState.RELEASED),
        absent(MIGRATION_ID),
    ],
    ids=lambda reservation: reservation.state,
)
def test_an_abort_reaches_the_request_however_much_is_remembered(
    reservation: Reservation,
) -> None:
    after, commands = advance(reservation, AbortAtDestination(**IDS))
    assert commands == (AbortRequest(**IDS),)
    assert after.may_move_on


def test_stages_out_of_order_are_not_current() -> None:
    reservation = make_reservation(ReservationState.RECEIVING, stage=2)
    assert is_current(reservation, announced(3, 10, 1))
    assert not is_current(reservation, announced(2, 10, 1))
    assert is_current(reservation, written(2, 10))
    assert not is_current(reservation, written(1, 10))
    assert not is_current(
        reservation,
        DeadlineExpired(migration_id=MIGRATION_ID, state=ReservationState.RECEIVING, stage=1),
    )
