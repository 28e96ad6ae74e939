"""Messages between the two ends of a migration.

A message is a command of the end that sends it and an event of the end that receives it: one class
for both, and for what is on the wire. Messages may be lost, doubled or late; they carry what
`is_current` needs to drop them. Fields with a default are filled in by the host that sends the
message or, where it says so, by the one that receives it: a table knows no payload and no engine.

Decoding checks types and ranges. Knows neither the rules nor how a message travels.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

# Blocks and stages: far more than there are, and little enough to multiply by bytes.
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Name = Annotated[str, msgspec.Meta(max_length=1 << 10)]


class MigrationMessage(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of all; the tag on the wire is the class name."""

    migration_id: Name


# ---- source -> destination --------------------------------------------------------------------


class ToDestination(MigrationMessage, frozen=True, kw_only=True):
    """A command of the source, an event of the destination."""


class ReserveBlocks(ToDestination, frozen=True, kw_only=True):
    """Hold blocks for the request. Answered by BlocksReserved or ReservationRejected.

    `state` is what the destination's engine needs to know of the request, encoded.
    """

    request_id: Name
    source: Name
    state: bytes = b""


class CopyBlocks(ToDestination, frozen=True, kw_only=True):
    """Copy the request's blocks [first_block, first_block + num_blocks) to the destination.

    The destination grows its reservation to hold them. The source's host keeps its blocks pinned
    until they are read, even if the migration ends meanwhile. A stage that travels in parts is
    announced once, by its first. Answered by BlocksCopied, or by ReservationRejected when the
    destination cannot grow.
    """

    stage: Count
    first_block: Count
    num_blocks: Count
    is_final: bool = False


class CommitRequest(ToDestination, frozen=True, kw_only=True):
    """Take over the suspended request of `num_blocks` blocks, as soon as all of them are there.

    `final` is what is only known once the request is suspended, encoded. May be repeated. Answered
    by CommitAcknowledged or CommitRefused.
    """

    num_blocks: Count
    final: bytes = b""


class QueryCommit(ToDestination, frozen=True, kw_only=True):
    """Say what became of the commit. A destination that has not committed by now never will."""


class ReleaseReservation(ToDestination, frozen=True, kw_only=True):
    """Give the reservation up; if the message is lost, the reservation's deadline does."""

    reason: str = ""


class AbortAtDestination(ToDestination, frozen=True, kw_only=True):
    """The client aborted the request while it moved: abort it where it is now. Closes the
    migration. It is sent once, so the link must not lose it while both ends live."""

    request_id: Name


class CloseMigration(ToDestination, frozen=True, kw_only=True):
    """The acknowledgement came: the destination need not remember the outcome and may move the
    request on. If the message is lost, the acknowledgement comes again; a host that has forgotten
    the migration by then answers with this all the same."""


# ---- destination -> source --------------------------------------------------------------------


class ToSource(MigrationMessage, frozen=True, kw_only=True):
    """A command of the destination, an event of the source."""


class BlocksReserved(ToSource, frozen=True, kw_only=True):
    """Blocks are held for the request; the first `num_cached_blocks` have content.

    `num_full_blocks_now` and `num_preemptions` are the source's own, which it fills in when the
    message comes: full blocks that no step in flight writes to, and the engine's counter for the
    request.
    """

    num_cached_blocks: Count
    num_full_blocks_now: int = 0
    num_preemptions: int = 0


class ReservationRejected(ToSource, frozen=True, kw_only=True):
    """There is no room, at first or for the growth of a stage, and nothing is held now.

    `refusal` is the host's word for the reason, if the engine had one.
    """

    reason: str
    refusal: str = ""


class BlocksCopied(ToSource, frozen=True, kw_only=True):
    """A stage is in the KV cache; the destination now holds the first `num_blocks_total` blocks.

    `num_full_blocks_now` and `num_preemptions` as in BlocksReserved.
    """

    stage: Count
    num_blocks_total: Count
    num_full_blocks_now: int = 0
    num_preemptions: int = 0


class CommitAcknowledged(ToSource, frozen=True, kw_only=True):
    """The destination runs the request. Answers a CommitRequest or a QueryCommit, and comes again
    until the migration is closed.

    The destination had the request's next token `held_back_s` ago, or has not had it yet (0).
    """

    held_back_s: float = 0.0


class CommitRefused(ToSource, frozen=True, kw_only=True):
    """The destination has not taken the request over and never will, for this migration."""

    reason: str
