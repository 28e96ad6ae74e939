"""Live migration seen from the source: one frozen record, one transition table.

`advance(migration, event)` is the whole protocol. The request keeps decoding while its full
blocks are copied in stages; it is suspended for the last stage only, which takes CommitRequest
along, and where the destination's steps are long only when one of them is about to end. Before that
is sent the source may always abort and resume by itself; from then on only the destination's word
decides, so a source that hears nothing asks (RESOLVING) with the request suspended and never
guesses.

Invariant: a request that the source may decode is one that the destination has not been asked to
take over, has refused, or died with. Late messages are dropped with `is_current` before the table.
Knows no clock (`wait` says how long the host may wait in a state), no engine, no link.
"""

from __future__ import annotations

from dataclasses import replace

from llumsched.core.migration.events import DeadlineExpired, PeerLost
from llumsched.core.migration.groups import CacheGroup
from llumsched.core.migration.messages import BlocksCopied, BlocksReserved
from llumsched.core.migration.source.events import (
    AbortedAtSource,
    MigrationState,
    RequestSuspended,
    SourceCommand,
    SourceEvent,
)
from llumsched.core.migration.source.record import AbortReason, Migration, MigrationOptions
from llumsched.core.migration.source.rules import TABLE, SourceRule, copy_blocks, reserve_blocks


def start(
    *,
    migration_id: str,
    request_id: str,
    source: str,
    destination: str,
    num_preemptions: int,
    groups: tuple[CacheGroup, ...] = (),
    options: MigrationOptions | None = None,
) -> tuple[Migration, tuple[SourceCommand, ...]]:
    """Begin: the migration in RESERVING and its first command."""
    migration = Migration(
        migration_id=migration_id,
        request_id=request_id,
        source=source,
        destination=destination,
        options=options or MigrationOptions(),
        num_preemptions_at_start=num_preemptions,
        num_preemptions=num_preemptions,
        groups=groups,
    )
    return migration, (reserve_blocks(migration),)


def is_current(migration: Migration, event: SourceEvent) -> bool:
    """True if `event` is about this migration as it stands; the host drops it otherwise."""
    if event.migration_id != migration.migration_id:
        return False
    match event:
        case BlocksCopied():
            return event.stage == migration.stage
        case DeadlineExpired():
            return (event.state, event.stage) == (migration.state, migration.stage)
    return True


def wait(migration: Migration) -> tuple[float, DeadlineExpired] | None:
    """How many seconds to wait in this state, and for what event; None in a terminal state."""
    options = migration.options
    timeout_s = {
        MigrationState.RESERVING: options.reserve_timeout_s,
        MigrationState.COPYING: options.stage_timeout_s,
        MigrationState.SUSPENDING: options.suspend_timeout_s + migration.suspend_after_s,
        MigrationState.COMMITTING: options.commit_timeout_s
        + (options.final_stage_timeout_s if migration.num_blocks_left else 0.0),
        MigrationState.RESOLVING: options.query_interval_s,
    }.get(migration.state)
    if timeout_s is None:
        return None
    expired = DeadlineExpired(
        migration_id=migration.migration_id, state=migration.state, stage=migration.stage
    )
    return timeout_s, expired


def advance(
    migration: Migration, event: SourceEvent
) -> tuple[Migration, tuple[SourceCommand, ...]]:
    """The migration after `event`, and what is to be done about it, in order.

    Raises IllegalTransition for an event that cannot occur in this state.
    """
    informed = _absorb(migration, event)
    rule = TABLE.choose(migration.state, event, informed)
    if rule is None:
        return migration, ()
    entered = _enter(informed, rule, event)
    return entered, tuple(command(entered) for command in rule.do)


def _absorb(migration: Migration, event: SourceEvent) -> Migration:
    """Take over the facts that an event states, before any rule is chosen."""
    match event:
        case BlocksReserved():
            return replace(
                migration,
                num_blocks_copied=event.num_cached_blocks,
                num_copyable_blocks=event.num_full_blocks_now,
                num_preemptions=event.num_preemptions,
                step_ends_in_s=event.step_ends_in_s,
                step_s=event.step_s,
                hand_over_s=event.hand_over_s,
            )
        case BlocksCopied():
            return replace(
                migration,
                num_blocks_copied=event.num_blocks_total,
                num_copyable_blocks=event.num_full_blocks_now,
                num_preemptions=event.num_preemptions,
                step_ends_in_s=event.step_ends_in_s,
                step_s=event.step_s,
                hand_over_s=event.hand_over_s,
            )
        case RequestSuspended():
            return replace(
                migration,
                num_copyable_blocks=migration.num_blocks_copied + event.num_blocks_to_copy,
                num_preemptions=event.num_preemptions,
            )
        case AbortedAtSource():
            return replace(migration, abort_requested=True)
        case PeerLost(is_dead=True):
            return replace(migration, destination_is_dead=True)
    return migration


def _enter(migration: Migration, rule: SourceRule, event: SourceEvent) -> Migration:
    if copy_blocks in rule.do:
        migration = replace(
            migration, stage=migration.stage + 1, num_stage_blocks=migration.num_blocks_left
        )
    if rule.to is MigrationState.ABORTED:
        assert isinstance(rule.reason, AbortReason)
        detail = getattr(event, "reason", "")
        return replace(migration, state=rule.to, abort_reason=rule.reason, abort_detail=detail)
    return replace(migration, state=rule.to)
