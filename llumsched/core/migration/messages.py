"""Messages between the two ends of a migration.

A message is a command of the end that sends it and an event of the end that receives it: one class
for both, and for what is on the wire. Messages may be lost, doubled or late; they carry what
`is_current` needs to drop them. Fields with a default are filled in by the host that sends the
message or, where it says so, by the one that receives it: a table knows no payload and no engine.

Numbers of blocks and stages are not negative. Knows neither the rules nor how a message travels.
"""

from __future__ import annotations

from dataclasses import dataclass

from llumsched.core.migration.groups import CacheGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationMessage:
    """Base of all messages of the protocol."""

    migration_id: str


# ---- source -> destination --------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ToDestination(MigrationMessage):
    """A command of the source, an event of the destination."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReserveBlocks(ToDestination):
    """Hold blocks for the request. Answered by BlocksReserved or ReservationRejected.

    `state` is what the destination's engine needs to know of the request, encoded; `groups` are
    those of the source's KV cache, which say what is copied when.
    """

    request_id: str
    source: str
    groups: tuple[CacheGroup, ...] = ()
    state: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyBlocks(ToDestination):
    """Copy the request's blocks [first_block, first_block + num_blocks) to the destination.

    Blocks are counted over all groups, in the order of `groups`. Live ones are in the last stage.
    The destination grows its reservation to hold them. The source's host keeps its blocks pinned
    until they are read, even if the migration ends meanwhile. A stage that travels in parts is
    announced once, by its first. Answered by BlocksCopied, or by ReservationRejected when the
    destination cannot grow.
    """

    stage: int
    first_block: int
    num_blocks: int
    is_final: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRequest(ToDestination):
    """Take over the suspended request of `num_blocks` blocks, as soon as all of them are there.

    `final` is what is only known once the request is suspended, encoded. May be repeated. Answered
    by CommitAcknowledged or CommitRefused.
    """

    num_blocks: int
    final: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryCommit(ToDestination):
    """Say what became of the commit. A destination that has not committed by now never will."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseReservation(ToDestination):
    """Give the reservation up; if the message is lost, the reservation's deadline does."""

    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortAtDestination(ToDestination):
    """The client aborted the request while it moved: abort it where it is now. Closes the
    migration. It is sent once, so the link must not lose it while both ends live."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseMigration(ToDestination):
    """The acknowledgement came: the destination need not remember the outcome and may move the
    request on. If the message is lost, the acknowledgement comes again; a host that has forgotten
    the migration by then answers with this all the same."""


# ---- destination -> source --------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ToSource(MigrationMessage):
    """A command of the destination, an event of the source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksReserved(ToSource):
    """Blocks are held for the request; the first `num_cached_blocks` have content.

    The destination's host says how long its steps are: `step_s` is about what one takes, and the
    one under way is over in about `step_ends_in_s`; both 0 where it does not know.

    `num_full_blocks_now`, `num_preemptions` and `hand_over_s` are the source's own, which it fills
    in when the message comes: full blocks that no step in flight writes to, the engine's counter
    for the request, and how long it would take to suspend the request and send what is left.
    """

    num_cached_blocks: int
    step_ends_in_s: float = 0.0
    step_s: float = 0.0
    num_full_blocks_now: int = 0
    num_preemptions: int = 0
    hand_over_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservationRejected(ToSource):
    """There is no room, at first or for the growth of a stage, and nothing is held now.

    `refusal` is the host's word for the reason, if the engine had one.
    """

    reason: str
    refusal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksCopied(ToSource):
    """A stage is in the KV cache; the destination now holds the first `num_blocks_total` blocks.

    What either host fills in is as in BlocksReserved.
    """

    stage: int
    num_blocks_total: int
    step_ends_in_s: float = 0.0
    step_s: float = 0.0
    num_full_blocks_now: int = 0
    num_preemptions: int = 0
    hand_over_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitAcknowledged(ToSource):
    """The destination runs the request. Answers a CommitRequest or a QueryCommit, and comes again
    until the migration is closed.

    The destination had the request's next token `held_back_s` ago, or has not had it yet (0).
    """

    held_back_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRefused(ToSource):
    """The destination has not taken the request over and never will, for this migration."""

    reason: str
