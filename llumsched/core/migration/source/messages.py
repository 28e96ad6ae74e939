"""Events that a migration takes in at its source, and commands that it gives.

Events state facts; those that come from the destination may be late, lost or doubled, and carry
what `is_current` needs to drop them. Commands are carried out by the host, in the order given.
Knows neither the rules (core/migration_rules.py) nor how a message travels.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class MigrationState(StrEnum):
    """Where the source stands. The last two are terminal."""

    RESERVING = "RESERVING"
    COPYING = "COPYING"
    SUSPENDING = "SUSPENDING"
    COMMITTING = "COMMITTING"
    RESOLVING = "RESOLVING"
    COMMITTED = "COMMITTED"
    ABORTED = "ABORTED"


class Side(StrEnum):
    """Owner of a copy of the request's blocks."""

    SOURCE = "SOURCE"
    DESTINATION = "DESTINATION"


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationEvent:
    migration_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksReserved(MigrationEvent):
    """The destination holds blocks for the request; `num_cached_blocks` of them have content.

    `num_full_blocks_now` and `num_preemptions` are the source's own, read when the event is made:
    full blocks that no step in flight writes to, and the engine's counter for the request.
    """

    num_cached_blocks: int
    num_full_blocks_now: int
    num_preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservationRejected(MigrationEvent):
    """The destination has no room, at first or for the growth of a stage, and holds nothing now."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksCopied(MigrationEvent):
    """The destination has written a stage; it now holds the first `num_blocks_total` blocks.

    `num_full_blocks_now` and `num_preemptions` as in BlocksReserved.
    """

    stage: int
    num_blocks_total: int
    num_full_blocks_now: int
    num_preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSuspended(MigrationEvent):
    """No step in flight touches the request and none will.

    `num_blocks_to_copy` counts the blocks after those that are copied, the partial tail included.
    """

    num_blocks_to_copy: int
    num_preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFinished(MigrationEvent):
    """The source decoded the request to its end and has freed it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestAborted(MigrationEvent):
    """The client aborted the request at the source. The engine may have dropped it already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPreempted(MigrationEvent):
    """The source's engine took the request's blocks away; it will recompute the request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitAcknowledged(MigrationEvent):
    """The destination has taken the request over. Answers a CommitRequest or a QueryCommit, and
    comes again until the destination hears that the migration is closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRefused(MigrationEvent):
    """The destination has not taken the request over and never will, for this migration."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlineExpired(MigrationEvent):
    """The wait of `state` (and `stage`) has lasted for `timeout_s(migration)`."""

    state: MigrationState
    stage: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLost(MigrationEvent):
    """The destination cannot be reached, or, if `is_dead`, its process is known to be gone.

    Silence is never death: set `is_dead` only on the word of whoever owns the process. An instance
    that restarts has a new id, so what is dead stays dead.
    """

    reason: str
    is_dead: bool = False


EVENTS: tuple[type[MigrationEvent], ...] = (
    BlocksReserved,
    ReservationRejected,
    BlocksCopied,
    RequestSuspended,
    RequestFinished,
    RequestAborted,
    RequestPreempted,
    CommitAcknowledged,
    CommitRefused,
    DeadlineExpired,
    PeerLost,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationCommand:
    migration_id: str
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReserveBlocks(MigrationCommand):
    """Ask the destination for blocks. Answered by BlocksReserved or ReservationRejected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyBlocks(MigrationCommand):
    """Copy the request's blocks [first_block, first_block + num_blocks) to the destination.

    The destination grows its reservation to hold them. The host keeps the source's blocks pinned
    until they are read, even if the migration ends meanwhile. Answered by BlocksCopied, or by
    ReservationRejected when the destination cannot grow.
    """

    stage: int
    first_block: int
    num_blocks: int
    final: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspendRequest(MigrationCommand):
    """Stop scheduling the request and wait for its steps in flight. Answered by RequestSuspended,
    or by RequestFinished or RequestPreempted if that came first."""

    num_blocks_copied: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRequest(MigrationCommand):
    """Hand the request over: the destination holds all `num_blocks` of it and may decode."""

    num_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryCommit(MigrationCommand):
    """Ask what became of the commit. A destination that has not committed by now never will."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseBlocks(MigrationCommand):
    """SOURCE: drop the request with no output; nothing if it is gone already.
    DESTINATION: give the reservation up; if the message is lost, its deadline does."""

    side: Side


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeRequest(MigrationCommand):
    """Let the source schedule the request again; nothing if it is not suspended.

    `may_have_decoded`: the destination died with the commit's fate unknown, so the client may have
    tokens from it. The host drops, by position, the tokens that the source now repeats.
    """

    may_have_decoded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortAtDestination(MigrationCommand):
    """Pass the client's abort on to the instance that has the request now. Closes the migration.

    As the answer to an acknowledgement it is repeated with it. When the client aborts later than
    that, the host delivers it at least once, unless the destination is dead.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseMigration(MigrationCommand):
    """Tell the destination that its acknowledgement came: it need not remember the outcome and may
    move the request on. If the message is lost, the acknowledgement comes again. A host that has
    forgotten the migration by then answers with this all the same."""
