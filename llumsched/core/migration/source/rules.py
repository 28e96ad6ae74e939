"""The rules of a migration at its source: what each event leads to in each state.

Guards and commands are functions of the record alone, so the table can be walked: the tests do, and
the diagram in docs/migration-protocol.md is drawn from it.
"""

from __future__ import annotations

from collections.abc import Callable

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
    EVENTS,
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
from llumsched.core.migration.source.record import TERMINAL_STATES, AbortReason, Migration
from llumsched.core.migration.table import Rule, TransitionTable

# Guards.


def preempted(migration: Migration) -> bool:
    # What was copied may lie beyond what the source can vouch for after recomputing.
    return migration.num_preemptions != migration.num_preemptions_at_start


def little_left(migration: Migration) -> bool:
    limit = migration.options.final_stage_blocks * migration.num_settled_groups
    return migration.num_blocks_left <= limit


def nothing_left(migration: Migration) -> bool:
    return migration.num_blocks_left == 0


def stages_shrink(migration: Migration) -> bool:
    return (
        migration.stage < migration.options.max_stages
        and migration.num_blocks_left < migration.num_stage_blocks
    )


def worth_a_pause(migration: Migration) -> bool:
    limit = migration.options.max_final_stage_blocks * migration.num_settled_groups
    return migration.num_blocks_left <= limit


def abort_requested(migration: Migration) -> bool:
    return migration.abort_requested


def dead_and_abort_requested(migration: Migration) -> bool:
    return migration.destination_is_dead and migration.abort_requested


def destination_is_dead(migration: Migration) -> bool:
    return migration.destination_is_dead


# Commands.


def reserve_blocks(migration: Migration) -> SourceCommand:
    return ReserveBlocks(
        migration_id=migration.migration_id,
        request_id=migration.request_id,
        source=migration.source,
        groups=migration.groups,
    )


def copy_blocks(migration: Migration) -> SourceCommand:
    return CopyBlocks(
        migration_id=migration.migration_id,
        stage=migration.stage,
        first_block=migration.num_blocks_copied,
        num_blocks=migration.num_stage_blocks,
        is_final=migration.state is MigrationState.COMMITTING,
    )


def suspend_request(migration: Migration) -> SourceCommand:
    return SuspendRequest(
        migration_id=migration.migration_id,
        request_id=migration.request_id,
        num_blocks_copied=migration.num_blocks_copied,
        after_s=migration.suspend_after_s,
    )


def commit_request(migration: Migration) -> SourceCommand:
    return CommitRequest(
        migration_id=migration.migration_id,
        num_blocks=migration.num_blocks_copied + migration.num_blocks_left,
    )


def query_commit(migration: Migration) -> SourceCommand:
    return QueryCommit(migration_id=migration.migration_id)


def release_request(migration: Migration) -> SourceCommand:
    return ReleaseRequest(migration_id=migration.migration_id, request_id=migration.request_id)


def release_reservation(migration: Migration) -> SourceCommand:
    return ReleaseReservation(
        migration_id=migration.migration_id, reason=migration.abort_reason or ""
    )


def resume_request(migration: Migration) -> SourceCommand:
    return ResumeRequest(migration_id=migration.migration_id, request_id=migration.request_id)


def abort_at_destination(migration: Migration) -> SourceCommand:
    return AbortAtDestination(migration_id=migration.migration_id, request_id=migration.request_id)


def close_migration(migration: Migration) -> SourceCommand:
    return CloseMigration(migration_id=migration.migration_id)


# The table.

SourceRule = Rule[MigrationState, Migration, SourceCommand]
Command = Callable[[Migration], SourceCommand]

RESERVING = MigrationState.RESERVING
COPYING = MigrationState.COPYING
SUSPENDING = MigrationState.SUSPENDING
COMMITTING = MigrationState.COMMITTING
RESOLVING = MigrationState.RESOLVING
COMMITTED = MigrationState.COMMITTED
ABORTED = MigrationState.ABORTED


def _go(
    to: MigrationState, *do: Command, when: Callable[[Migration], bool] | None = None
) -> SourceRule:
    return Rule(to=to, do=do, when=when)


def _abort(
    reason: AbortReason, *do: Command, when: Callable[[Migration], bool] | None = None
) -> SourceRule:
    return Rule(to=ABORTED, do=do, when=when, reason=reason)


_REFUSED = (
    _abort(AbortReason.REQUEST_ABORTED, release_request, when=abort_requested),
    _abort(AbortReason.COMMIT_REFUSED, resume_request),
)
_ACKNOWLEDGED = (
    _go(COMMITTED, release_request, abort_at_destination, when=abort_requested),
    _go(COMMITTED, release_request, close_migration),
)
_DEAD = (
    _abort(AbortReason.REQUEST_ABORTED, release_request, when=dead_and_abort_requested),
    _abort(AbortReason.PEER_LOST, resume_request, when=destination_is_dead),
)

_RULES: dict[tuple[MigrationState, type[SourceEvent]], tuple[SourceRule, ...]] = {
    # The request decodes at the source; nothing needs undoing there.
    (RESERVING, BlocksReserved): (
        _abort(AbortReason.REQUEST_PREEMPTED, release_reservation, when=preempted),
        _go(SUSPENDING, suspend_request, when=little_left),
        _go(COPYING, copy_blocks),
    ),
    (COPYING, BlocksCopied): (
        _abort(AbortReason.REQUEST_PREEMPTED, release_reservation, when=preempted),
        _go(SUSPENDING, suspend_request, when=little_left),
        _go(COPYING, copy_blocks, when=stages_shrink),
        _go(SUSPENDING, suspend_request, when=worth_a_pause),
        _abort(AbortReason.DECODES_FASTER_THAN_LINK, release_reservation),
    ),
    **{
        (state, event): (_abort(reason, *do),)
        for state in (RESERVING, COPYING)
        for event, reason, do in (
            (ReservationRejected, AbortReason.RESERVATION_REJECTED, ()),
            (FinishedAtSource, AbortReason.REQUEST_FINISHED, (release_reservation,)),
            (
                AbortedAtSource,
                AbortReason.REQUEST_ABORTED,
                (release_request, release_reservation),
            ),
            (PreemptedAtSource, AbortReason.REQUEST_PREEMPTED, (release_reservation,)),
            (DeadlineExpired, AbortReason.DEADLINE_EXPIRED, (release_reservation,)),
            (PeerLost, AbortReason.PEER_LOST, (release_reservation,)),
        )
    },
    # The request is suspended, or about to be; the destination has not been asked to take over.
    # It is asked along with the last stage, and does so when it has that stage: a reply between the
    # two would only prolong the pause.
    (SUSPENDING, RequestSuspended): (
        _abort(AbortReason.REQUEST_PREEMPTED, release_reservation, resume_request, when=preempted),
        _go(COMMITTING, commit_request, when=nothing_left),
        _go(COMMITTING, copy_blocks, commit_request),
    ),
    # The suspension may still be on its way to the engine, so a preempted request resumes too.
    (SUSPENDING, PreemptedAtSource): (
        _abort(AbortReason.REQUEST_PREEMPTED, release_reservation, resume_request),
    ),
    (SUSPENDING, FinishedAtSource): (_abort(AbortReason.REQUEST_FINISHED, release_reservation),),
    **{
        (SUSPENDING, event): (_abort(reason, *do),)
        for event, reason, do in (
            (ReservationRejected, AbortReason.RESERVATION_REJECTED, (resume_request,)),
            (
                AbortedAtSource,
                AbortReason.REQUEST_ABORTED,
                (release_request, release_reservation),
            ),
            (
                DeadlineExpired,
                AbortReason.DEADLINE_EXPIRED,
                (release_reservation, resume_request),
            ),
            (PeerLost, AbortReason.PEER_LOST, (release_reservation, resume_request)),
        )
    },
    # The destination decides now. A client's abort waits for the outcome, which says whose it is.
    (COMMITTING, CommitAcknowledged): _ACKNOWLEDGED,
    (COMMITTING, CommitRefused): _REFUSED,
    (COMMITTING, AbortedAtSource): (_go(COMMITTING),),
    (COMMITTING, DeadlineExpired): (_go(RESOLVING, query_commit),),
    (COMMITTING, PeerLost): (*_DEAD, _go(RESOLVING, query_commit)),
    (RESOLVING, CommitAcknowledged): _ACKNOWLEDGED,
    (RESOLVING, CommitRefused): _REFUSED,
    (RESOLVING, AbortedAtSource): (_go(RESOLVING),),
    (RESOLVING, DeadlineExpired): (_go(RESOLVING, query_commit),),
    (RESOLVING, PeerLost): (*_DEAD, _go(RESOLVING)),
    # The engine had it before it was told to drop the request.
    (COMMITTED, AbortedAtSource): (_go(COMMITTED, abort_at_destination),),
}

_OVER: set[tuple[MigrationState, type[SourceEvent]]] = {
    (state, event) for state in TERMINAL_STATES for event in EVENTS
}

_IGNORED: frozenset[tuple[MigrationState, type[SourceEvent]]] = frozenset(
    {
        # Doubled on the link.
        *((state, BlocksReserved) for state in (COPYING, SUSPENDING, COMMITTING, RESOLVING)),
        *((state, BlocksCopied) for state in (SUSPENDING, COMMITTING, RESOLVING)),
        # Only the answer to the commit decides its fate.
        *((state, ReservationRejected) for state in (COMMITTING, RESOLVING)),
        # Over: the request's life goes on without the migration. A host answers acknowledgements
        # that come again by itself, since it need not remember what is over.
        *(_OVER - {(COMMITTED, AbortedAtSource)}),
    }
)

_ILLEGAL: frozenset[tuple[MigrationState, type[SourceEvent]]] = frozenset(
    {
        # No stage has begun.
        (RESERVING, BlocksCopied),
        # Nobody has asked the source to suspend, or it has answered already.
        *((state, RequestSuspended) for state in (RESERVING, COPYING, COMMITTING, RESOLVING)),
        # A suspended request is not scheduled.
        *(
            (state, event)
            for state in (COMMITTING, RESOLVING)
            for event in (FinishedAtSource, PreemptedAtSource)
        ),
        # The destination answers a commit that has not been requested.
        *(
            (state, event)
            for state in (RESERVING, COPYING, SUSPENDING)
            for event in (CommitAcknowledged, CommitRefused)
        ),
    }
)

TABLE: TransitionTable[MigrationState, Migration, SourceEvent, SourceCommand] = TransitionTable(
    states=MigrationState, events=EVENTS, rules=_RULES, ignored=_IGNORED, illegal=_ILLEGAL
)
