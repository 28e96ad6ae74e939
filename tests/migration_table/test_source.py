"""The source's side, event by event."""

from __future__ import annotations

from dataclasses import replace

import pytest

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
from llumsched.core.migration.source.events import (
    AbortedAtSource,
    FinishedAtSource,
    MigrationState,
    PreemptedAtSource,
    ReleaseRequest,
    RequestSuspended,
    ResumeRequest,
    SourceCommand,
    SourceEvent,
    SuspendRequest,
)
from llumsched.core.migration.source.machine import advance, is_current, start, wait
from llumsched.core.migration.source.record import AbortReason, Migration, MigrationOptions
from tests.migration_table.samples import IDS, MIGRATION_ID, make_migration

RELEASE_REQUEST = ReleaseRequest(**IDS)
CLOSE = CloseMigration(migration_id=MIGRATION_ID)


def release(reason: AbortReason) -> ReleaseReservation:
    return ReleaseReservation(migration_id=MIGRATION_ID, reason=reason)


def reserved(num_cached: int, num_full: int, num_preemptions: int = 0) -> BlocksReserved:
    return BlocksReserved(
        migration_id=MIGRATION_ID,
        num_cached_blocks=num_cached,
        num_full_blocks_now=num_full,
        num_preemptions=num_preemptions,
    )


def copied(stage: int, num_total: int, num_full: int, num_preemptions: int = 0) -> BlocksCopied:
    return BlocksCopied(
        migration_id=MIGRATION_ID,
        stage=stage,
        num_blocks_total=num_total,
        num_full_blocks_now=num_full,
        num_preemptions=num_preemptions,
    )


def suspended(num_left: int, num_preemptions: int = 0) -> RequestSuspended:
    return RequestSuspended(
        migration_id=MIGRATION_ID, num_blocks_to_copy=num_left, num_preemptions=num_preemptions
    )


def deadline(migration: Migration) -> DeadlineExpired:
    return DeadlineExpired(migration_id=MIGRATION_ID, state=migration.state, stage=migration.stage)


def waiting(migration: Migration) -> float:
    """Seconds until the deadline."""
    due = wait(migration)
    assert due is not None
    return due[0]


def run(migration: Migration, *events: SourceEvent) -> tuple[Migration, tuple[SourceCommand, ...]]:
    """The migration after all events, and what the last one asked for."""
    commands: tuple[SourceCommand, ...] = ()
    for event in events:
        migration, commands = advance(migration, event)
    return migration, commands


def begin(options: MigrationOptions | None = None) -> Migration:
    migration, commands = start(
        migration_id=MIGRATION_ID,
        request_id="r",
        source="a",
        destination="b",
        num_preemptions=0,
        options=options,
    )
    assert commands == (ReserveBlocks(**IDS, source="a"),)
    return migration


def test_a_migration_in_three_stages() -> None:
    migration = begin()
    steps: list[tuple[SourceEvent, MigrationState, SourceCommand]] = [
        (
            reserved(num_cached=2, num_full=90),
            MigrationState.COPYING,
            CopyBlocks(migration_id=MIGRATION_ID, stage=1, first_block=2, num_blocks=88),
        ),
        (
            copied(stage=1, num_total=90, num_full=94),
            MigrationState.COPYING,
            CopyBlocks(migration_id=MIGRATION_ID, stage=2, first_block=90, num_blocks=4),
        ),
        (
            copied(stage=2, num_total=94, num_full=94),
            MigrationState.SUSPENDING,
            SuspendRequest(**IDS, num_blocks_copied=94),
        ),
    ]
    for event, state, command in steps:
        assert is_current(migration, event)
        migration, commands = advance(migration, event)
        assert (migration.state, commands) == (state, (command,))
    migration, commands = advance(migration, suspended(num_left=1))
    assert migration.state is MigrationState.COMMITTING
    assert commands == (
        CopyBlocks(migration_id=MIGRATION_ID, stage=3, first_block=94, num_blocks=1, is_final=True),
        CommitRequest(migration_id=MIGRATION_ID, num_blocks=95),
    )
    # The destination may confirm the stage, if it has it before the commit.
    assert advance(migration, copied(3, 95, 94)) == (migration, ())
    migration, commands = advance(migration, CommitAcknowledged(migration_id=MIGRATION_ID))
    assert migration.state is MigrationState.COMMITTED
    assert commands == (RELEASE_REQUEST, CLOSE)


def test_a_short_request_is_moved_by_the_final_stage_alone() -> None:
    migration, commands = run(begin(), reserved(num_cached=0, num_full=1))
    assert commands == (SuspendRequest(**IDS, num_blocks_copied=0),)
    migration, commands = run(migration, suspended(num_left=2))
    assert commands == (
        CopyBlocks(migration_id=MIGRATION_ID, stage=1, first_block=0, num_blocks=2, is_final=True),
        CommitRequest(migration_id=MIGRATION_ID, num_blocks=2),
    )


def of_step(ends_in_s: float, step_s: float, hand_over_s: float = 0.05) -> BlocksCopied:
    """The stage is copied; the destination's step under way goes on for so long."""
    return replace(
        copied(stage=1, num_total=8, num_full=8),
        step_ends_in_s=ends_in_s,
        step_s=step_s,
        hand_over_s=hand_over_s,
    )


@pytest.mark.parametrize(
    ("ends_in_s", "step_s", "after_s"),
    [
        pytest.param(0.0, 0.0, 0.0, id="unknown"),
        pytest.param(0.02, 0.1, 0.0, id="short steps: to wait would be no shorter"),
        pytest.param(1.5, 2.0, 1.25, id="at the end of the step under way"),
        pytest.param(0.2, 2.0, 1.95, id="too late for that: at the end of the next"),
        pytest.param(0.0, 2.0, 1.75, id="it takes longer than it was thought to"),
        pytest.param(30.0, 31.0, 0.0, id="too long to wait for"),
    ],
)
def test_a_request_is_suspended_as_a_long_step_of_the_destination_ends(
    ends_in_s: float, step_s: float, after_s: float
) -> None:
    migration, (command,) = run(begin(), reserved(0, 8), of_step(ends_in_s, step_s))
    assert migration.state is MigrationState.SUSPENDING
    assert isinstance(command, SuspendRequest)
    assert command.after_s == pytest.approx(after_s)
    # The source has as long as ever to suspend it from then on.
    assert waiting(migration) == pytest.approx(MigrationOptions().suspend_timeout_s + after_s)


def test_no_step_is_waited_for_where_that_is_switched_off() -> None:
    options = MigrationOptions(max_step_wait_s=0)
    _, commands = run(begin(options), reserved(0, 8), of_step(1.5, 2.0))
    assert commands == (SuspendRequest(**IDS, num_blocks_copied=8),)


def test_the_request_may_end_while_it_waits_for_a_step() -> None:
    waits, _ = run(begin(), reserved(0, 8), of_step(1.5, 2.0))
    migration, commands = advance(waits, FinishedAtSource(migration_id=MIGRATION_ID))
    assert migration.abort_reason is AbortReason.REQUEST_FINISHED
    assert commands == (release(AbortReason.REQUEST_FINISHED),)


def test_a_commit_that_has_to_wait_for_a_stage_is_waited_for_as_long() -> None:
    options = MigrationOptions(commit_timeout_s=2, final_stage_timeout_s=10)
    short, _ = run(begin(options), reserved(num_cached=3, num_full=3), suspended(num_left=0))
    assert waiting(short) == 2
    migration, _ = run(begin(options), reserved(num_cached=0, num_full=1), suspended(num_left=2))
    assert waiting(migration) == 12


def test_what_the_destination_has_cached_is_not_copied() -> None:
    # Its prefix cache may even reach beyond the source's full blocks.
    migration, commands = run(begin(), reserved(num_cached=3, num_full=2), suspended(num_left=0))
    assert migration.state is MigrationState.COMMITTING
    assert commands == (CommitRequest(migration_id=MIGRATION_ID, num_blocks=3),)


OPTIONS = MigrationOptions(max_stages=3, final_stage_blocks=1, max_final_stage_blocks=4)


@pytest.mark.parametrize(
    ("stage", "num_stage_blocks", "num_left", "state"),
    [
        pytest.param(1, 10, 1, MigrationState.SUSPENDING, id="little is left"),
        pytest.param(1, 10, 9, MigrationState.COPYING, id="stages shrink"),
        pytest.param(1, 3, 3, MigrationState.SUSPENDING, id="no shrinking, worth a pause"),
        pytest.param(3, 10, 4, MigrationState.SUSPENDING, id="stages used up, worth a pause"),
        pytest.param(1, 5, 5, MigrationState.ABORTED, id="no shrinking, too much for a pause"),
        pytest.param(3, 10, 5, MigrationState.ABORTED, id="stages used up, too much for a pause"),
    ],
)
def test_the_stage_rule(
    stage: int, num_stage_blocks: int, num_left: int, state: MigrationState
) -> None:
    migration = make_migration(
        MigrationState.COPYING, options=OPTIONS, stage=stage, num_stage_blocks=num_stage_blocks
    )
    migration, commands = advance(migration, copied(stage, 10, 10 + num_left))
    assert migration.state is state
    if state is MigrationState.ABORTED:
        assert migration.abort_reason is AbortReason.DECODES_FASTER_THAN_LINK
        assert commands == (release(AbortReason.DECODES_FASTER_THAN_LINK),)


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(reserved(0, 50, num_preemptions=1), id="BlocksReserved"),
        pytest.param(copied(1, 50, 60, num_preemptions=1), id="BlocksCopied"),
        pytest.param(suspended(1, num_preemptions=1), id="RequestSuspended"),
    ],
)
def test_a_preemption_that_shows_in_the_counter_ends_the_migration(event: SourceEvent) -> None:
    state = {
        BlocksReserved: MigrationState.RESERVING,
        BlocksCopied: MigrationState.COPYING,
        RequestSuspended: MigrationState.SUSPENDING,
    }[type(event)]
    migration, commands = advance(make_migration(state), event)
    assert migration.abort_reason is AbortReason.REQUEST_PREEMPTED
    assert release(AbortReason.REQUEST_PREEMPTED) in commands
    assert (ResumeRequest(**IDS) in commands) == (state is MigrationState.SUSPENDING)


def test_a_destination_that_runs_out_of_blocks_costs_a_pause_and_nothing_else() -> None:
    event = ReservationRejected(migration_id=MIGRATION_ID, reason="0 blocks are free")
    migration, commands = advance(make_migration(MigrationState.SUSPENDING), event)
    assert migration.abort_reason is AbortReason.RESERVATION_REJECTED
    assert migration.abort_detail == "0 blocks are free"
    assert commands == (ResumeRequest(**IDS),)


def test_a_request_preempted_before_its_suspension_is_resumed_all_the_same() -> None:
    event = PreemptedAtSource(migration_id=MIGRATION_ID)
    _, commands = advance(make_migration(MigrationState.SUSPENDING), event)
    assert commands == (release(AbortReason.REQUEST_PREEMPTED), ResumeRequest(**IDS))


# The commit.


def test_a_commit_without_an_answer_is_asked_after_until_there_is_one() -> None:
    migration = make_migration(MigrationState.COMMITTING)
    for _ in range(3):
        migration, commands = advance(migration, deadline(migration))
        assert migration.state is MigrationState.RESOLVING
        assert commands == (QueryCommit(migration_id=MIGRATION_ID),)
    migration, commands = advance(migration, CommitAcknowledged(migration_id=MIGRATION_ID))
    assert commands == (RELEASE_REQUEST, CLOSE)


@pytest.mark.parametrize("state", [MigrationState.COMMITTING, MigrationState.RESOLVING])
def test_a_refused_commit_resumes_the_request(state: MigrationState) -> None:
    event = CommitRefused(migration_id=MIGRATION_ID, reason="expired")
    migration, commands = advance(make_migration(state), event)
    assert migration.abort_reason is AbortReason.COMMIT_REFUSED
    assert commands == (ResumeRequest(**IDS),)


@pytest.mark.parametrize("state", [MigrationState.COMMITTING, MigrationState.RESOLVING])
def test_an_unreachable_destination_never_resumes_the_request(state: MigrationState) -> None:
    migration = make_migration(state)
    for event in (
        PeerLost(migration_id=MIGRATION_ID, reason="no route"),
        ReservationRejected(migration_id=MIGRATION_ID, reason="a doubled message"),
        BlocksCopied(
            migration_id=MIGRATION_ID,
            stage=1,
            num_blocks_total=10,
            num_full_blocks_now=10,
            num_preemptions=0,
        ),
    ):
        migration, commands = advance(migration, event)
        assert migration.state in (MigrationState.COMMITTING, MigrationState.RESOLVING)
        assert not any(
            isinstance(c, ResumeRequest | ReleaseRequest | ReleaseReservation) for c in commands
        )


@pytest.mark.parametrize("state", [MigrationState.COMMITTING, MigrationState.RESOLVING])
def test_a_dead_destination_gives_the_request_back(state: MigrationState) -> None:
    event = PeerLost(migration_id=MIGRATION_ID, reason="killed", is_dead=True)
    migration, commands = advance(make_migration(state), event)
    assert migration.abort_reason is AbortReason.PEER_LOST
    assert commands == (ResumeRequest(**IDS),)


# The client's abort.


@pytest.mark.parametrize("state", [MigrationState.COMMITTING, MigrationState.RESOLVING])
@pytest.mark.parametrize(
    ("outcome", "commands"),
    [
        pytest.param(
            CommitAcknowledged(migration_id=MIGRATION_ID),
            (RELEASE_REQUEST, AbortAtDestination(**IDS)),
            id="acknowledged",
        ),
        pytest.param(
            CommitRefused(migration_id=MIGRATION_ID, reason="expired"),
            (RELEASE_REQUEST,),
            id="refused",
        ),
        pytest.param(
            PeerLost(migration_id=MIGRATION_ID, reason="killed", is_dead=True),
            (RELEASE_REQUEST,),
            id="dead",
        ),
    ],
)
def test_an_abort_during_the_commit_waits_for_its_outcome(
    state: MigrationState, outcome: SourceEvent, commands: tuple[SourceCommand, ...]
) -> None:
    abort = AbortedAtSource(migration_id=MIGRATION_ID)
    migration, nothing = advance(make_migration(state), abort)
    assert (migration.state, migration.abort_requested, nothing) == (state, True, ())
    assert advance(migration, outcome)[1] == commands


def test_an_abort_that_comes_after_the_commit_follows_the_request() -> None:
    aborted = AbortedAtSource(migration_id=MIGRATION_ID)
    migration, commands = advance(make_migration(MigrationState.COMMITTED), aborted)
    assert migration.state is MigrationState.COMMITTED
    assert commands == (AbortAtDestination(**IDS),)


# Late messages.


def test_messages_of_another_migration_or_stage_are_not_current() -> None:
    migration = make_migration(MigrationState.COPYING, stage=2)
    assert is_current(migration, copied(2, 10, 10))
    assert not is_current(migration, copied(1, 10, 10))
    assert not is_current(migration, replace(copied(2, 10, 10), migration_id="another"))
    assert is_current(migration, deadline(migration))
    assert not is_current(migration, replace(deadline(migration), stage=1))
    assert not is_current(migration, replace(deadline(migration), state=MigrationState.RESERVING))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_stages": 0}, "at least 1, not 0"),
        ({"final_stage_blocks": 9, "max_final_stage_blocks": 8}, "must not exceed"),
    ],
)
def test_options_that_contradict_themselves_are_refused(
    options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MigrationOptions(**options)
