"""Messages between the migrators of two instances, and the bytes that follow.

The messages of the protocol are the core's (``core.migration.messages``); here are those that the
connection itself needs. A ``CopyBlocks`` goes as one ``StoreBlocks`` for each part of its stage.
Decoding checks types and ranges, and runs no code of the sender's. KV bytes never lie in a message:
the transport has them (``engine.transfer``), be it in a second frame of the message.
"""

from __future__ import annotations

import msgspec

from llumsched.core.migration.messages import (
    AbortAtDestination,
    BlocksCopied,
    BlocksReserved,
    CloseMigration,
    CommitAcknowledged,
    CommitRefused,
    CommitRequest,
    Count,
    Name,
    QueryCommit,
    ReleaseReservation,
    ReservationRejected,
    ReserveBlocks,
)
from llumsched.wire.control import Message


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


PeerMessage = (
    Hello
    | Welcome
    | StoreBlocks
    | SlotRead
    | ReserveBlocks
    | CommitRequest
    | QueryCommit
    | ReleaseReservation
    | AbortAtDestination
    | CloseMigration
    | BlocksReserved
    | ReservationRejected
    | BlocksCopied
    | CommitAcknowledged
    | CommitRefused
)

decode_peer = msgspec.msgpack.Decoder(PeerMessage).decode
