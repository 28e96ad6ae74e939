"""Messages between the migrators of two instances, and the bytes that follow.

Decoding checks types and ranges, and runs no code of the sender's. KV bytes never lie in a message:
the transport has them (``engine.transfer``), be it in a second frame of the message.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from llumsched.wire.control import Message

# Blocks, stages and slots: far more than there are, and little enough to multiply by bytes.
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Name = Annotated[str, msgspec.Meta(max_length=1 << 10)]


class Hello(Message, frozen=True, kw_only=True):
    """Opens a connection. ``transport`` is what the sender is configured for, ``offers`` what it
    can do, best first: a transport's name, and what that transport says of this end."""

    instance_id: Name
    fingerprint: str
    transport: str
    offers: dict[Name, bytes]


class Welcome(Message, frozen=True, kw_only=True):
    """``transport`` is how bytes travel from now on, or ``refused`` why they cannot. Refused later
    than at first: they cannot any more, until the sender says Hello again. ``answer`` is what the
    transport says of this end.
    """

    transport: str = ""
    answer: bytes = b""
    refused: str | None = None


class Reserve(Message, frozen=True, kw_only=True):
    """``state`` is a ``RequestState``. The reservation has a deadline of its own."""

    migration_id: Name
    request_id: Name
    source: Name
    state: bytes


class Reserved(Message, frozen=True, kw_only=True):
    migration_id: Name
    num_cached_blocks: Count


class ReserveRejected(Message, frozen=True, kw_only=True):
    """``refusal`` is a ``Refusal``'s value, or empty if the reason is none of them."""

    migration_id: Name
    reason: str
    refusal: str = ""


class StoreBlocks(Message, frozen=True, kw_only=True):
    """Part of a stage: blocks ``first_block`` and following lie in ``slot``, whose ``use``-th use
    this is, or where the transport's ``note`` says. Every part names the whole stage, so the first
    to arrive announces it.

    ``checksum`` is the CRC-32 of the bytes, if the sender is configured to add it.
    """

    migration_id: Name
    stage: Count
    stage_first_block: Count
    stage_num_blocks: Count
    first_block: Count
    num_blocks: Count
    slot: Count
    use: int
    note: bytes = b""
    checksum: int | None = None


class SlotRead(Message, frozen=True, kw_only=True):
    """The slot's bytes, of this use of it, are not needed any more: to scatter them has taken
    ``core_s`` of a core's time."""

    slot: Count
    use: int
    core_s: float = 0.0


class StageStored(Message, frozen=True, kw_only=True):
    """A whole stage is in the destination's KV cache."""

    migration_id: Name
    stage: Count
    num_blocks_total: Count


class Commit(Message, frozen=True, kw_only=True):
    """``final`` is a ``FinalState``. May be repeated; so may its answer."""

    migration_id: Name
    num_blocks: Count
    final: bytes


class CommitAnswer(Message, frozen=True, kw_only=True):
    """``refused`` is ``None`` if the destination runs the request. It had the request's next token
    ``held_back_s`` ago, or has not had it yet (0)."""

    migration_id: Name
    refused: str | None = None
    held_back_s: float = 0.0


class QueryCommit(Message, frozen=True, kw_only=True):
    migration_id: Name


class ReleaseReservation(Message, frozen=True, kw_only=True):
    migration_id: Name
    reason: str


class MigrationClosed(Message, frozen=True, kw_only=True):
    """The source has the destination's answer; its record need not be kept."""

    migration_id: Name


class AbortMigrated(Message, frozen=True, kw_only=True):
    """The client left while the request moved: abort it where it has arrived."""

    migration_id: Name
    request_id: Name


PeerMessage = (
    Hello
    | Welcome
    | Reserve
    | Reserved
    | ReserveRejected
    | StoreBlocks
    | SlotRead
    | StageStored
    | Commit
    | CommitAnswer
    | QueryCommit
    | ReleaseReservation
    | MigrationClosed
    | AbortMigrated
)

decode_peer = msgspec.msgpack.Decoder(PeerMessage).decode
