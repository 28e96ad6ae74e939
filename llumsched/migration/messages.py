"""Messages between the migrators of two instances, and the bytes that follow.

The messages of the protocol are the core's (``core.migration.messages``); here are those that the
connection itself needs. A ``CopyBlocks`` goes as one ``StoreBlocks`` for each part of its stage.
Decoding checks types and ranges, and runs no code of the sender's. KV bytes never lie in a message:
the transport has them (``engine.transfer``), be it in a second frame of the message.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

import msgspec

from llumsched.core.migration.messages import (
    AbortAtDestination,
    BlocksCopied,
    BlocksReserved,
    CloseMigration,
    CommitAcknowledged,
    CommitRefused,
    CommitRequest,
    MigrationMessage,
    QueryCommit,
    ReleaseReservation,
    ReservationRejected,
    ReserveBlocks,
)
from llumsched.wire.control import Message, encode

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


class StoreBlocks(Message, frozen=True, kw_only=True):
    """Part of a stage: blocks ``first_block`` and following of a ``group`` lie in ``slot``, whose
    ``use``-th use this is, or where the transport's ``note`` says. Every part names the whole
    stage, so the first to arrive announces it: ``stage_num_sent`` of its blocks have content, and
    the request has ``stage_num_tokens`` tokens in them and before.

    ``checksum`` is the CRC-32 of the bytes, if the sender is configured to add it.
    """

    migration_id: Name
    stage: Count
    stage_first_block: Count
    stage_num_blocks: Count
    stage_num_sent: Count
    stage_num_tokens: Count
    group: Count
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


class Envelope(Message, frozen=True, kw_only=True):
    """Carries a message of the protocol: the name of its class, and its fields."""

    kind: str
    body: msgspec.Raw


PeerMessage = Hello | Welcome | StoreBlocks | SlotRead | MigrationMessage

_decode = msgspec.msgpack.Decoder(Hello | Welcome | StoreBlocks | SlotRead | Envelope).decode
_DECODE_BODY: dict[str, Any] = {
    kind.__name__: msgspec.msgpack.Decoder(kind).decode
    for kind in (
        ReserveBlocks,
        CommitRequest,
        QueryCommit,
        ReleaseReservation,
        AbortAtDestination,
        CloseMigration,
        BlocksReserved,
        ReservationRejected,
        BlocksCopied,
        CommitAcknowledged,
        CommitRefused,
    )
}
_MAX_COUNT = 1 << 31
_MAX_NAME = 1 << 10
_NAMES = frozenset({"migration_id", "request_id", "source"})


def encode_peer(message: PeerMessage) -> bytes:
    """The message as a frame."""
    if isinstance(message, MigrationMessage):
        body = msgspec.Raw(msgspec.msgpack.encode(message))
        return encode(Envelope(kind=type(message).__name__, body=body))
    return encode(message)


def decode_peer(frame: Any) -> PeerMessage:
    """The message in a frame.

    Raises:
        msgspec.DecodeError: if there is none, or its fields are not of their types and ranges.
    """
    decoded: Hello | Welcome | StoreBlocks | SlotRead | Envelope = _decode(frame)
    if not isinstance(decoded, Envelope):
        return decoded
    decode_body = _DECODE_BODY.get(decoded.kind)
    if decode_body is None:
        raise msgspec.ValidationError(f"no message of the protocol is {decoded.kind[:_MAX_NAME]!r}")
    message: MigrationMessage = decode_body(decoded.body)
    for field in fields(message):
        value = getattr(message, field.name)
        if isinstance(value, int | float) and not 0 <= value < _MAX_COUNT:
            raise msgspec.ValidationError(f"{field.name} is {value}")
        if field.name in _NAMES and len(value) > _MAX_NAME:
            raise msgspec.ValidationError(f"{field.name} has {len(value)} characters")
    return message
