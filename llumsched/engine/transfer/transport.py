"""A transport: one way for the blocks of a KV cache from one instance to another.

A transport is a class with four methods, and both ends of a connection have an object of it. At the
hand-shake the source *offers* it and the destination *accepts* or declines it; from then on the
source *sends* parts of stages and the destination *receives* them. Which transports there are is a
table (``core.transfer_options.TRANSPORTS``); which one is taken, the hand-shake (``registry``).

A part is as many blocks as fit into one slot of staging memory. Every part is announced by a
message of the migration protocol, and announced and received in the same order. A transport that
has the bytes pass through staging memory gathers a part before it announces it, and scatters it at
the other end; one whose destination reads the blocks itself announces what to read.

Knows no stages, reservations or requests.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import msgspec

from llumsched.engine.base import KVAccess
from llumsched.engine.transfer.shared_ring import SendRing, Staging

if TYPE_CHECKING:
    import torch

Write = Callable[[Sequence[int]], Awaitable[float]]
"""Puts a part into the blocks of these ids; the seconds of a core's time that other processes
took."""


class Unavailable(Exception):
    """The transport does not work between these two instances; the message says why."""


class Broken(RuntimeError):
    """Nothing gets through any more: the two instances have to shake hands again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """A transport's view of the instance that it runs in.

    Args:
        kv: the blocks.
        ring: staging memory for what leaves, which all connections share.
        host: an address at which the other instances reach this one.
        checksum: every part is to be checked where it arrives.
    """

    kv: KVAccess
    ring: SendRing
    host: str
    checksum: bool = False


class Announce(Protocol):
    """Sends the message that a part is on its way."""

    async def __call__(
        self, *, note: bytes, payload: memoryview[Any] | None, checksum: int | None
    ) -> None: ...


@dataclass(slots=True, kw_only=True)
class OutgoingPart:
    """Blocks of a group to send: ``block_ids``, by way of ``slot`` of the staging memory if need
    be.

    ``core_s`` counts the seconds of a core's time that other processes took.
    """

    here: Here
    group: int
    block_ids: Sequence[int]
    slot: int
    send: Announce
    core_s: float = 0.0
    _checksum: int | None = field(default=None, init=False)

    @property
    def num_bytes(self) -> int:
        """Size of its blocks."""
        return len(self.block_ids) * self.here.kv.block_num_bytes[self.group]

    async def gather(self, into: torch.Tensor | None = None) -> Staging:
        """Copy the blocks into the part's slot, or into other memory that has room for them."""
        num_bytes = self.num_bytes
        if into is None:
            staging = self.here.ring.staging(self.slot, num_bytes)
        else:
            staging = Staging(content=into[:num_bytes])
        self.core_s += await self.here.kv.gather(self.group, self.block_ids, staging)
        if self.here.checksum:
            self._checksum = checksum_of(staging.content)
        return staging

    async def announce(self, *, note: bytes = b"", payload: memoryview[Any] | None = None) -> None:
        """Tell the destination. ``note`` is the transport's own, ``payload`` bytes that travel with
        the message; they are read later, until the slot comes back."""
        await self.send(note=note, payload=payload, checksum=self._checksum)


@dataclass(frozen=True, slots=True, kw_only=True)
class IncomingPart:
    """A part that was announced: ``num_blocks`` blocks of a group in ``slot`` of the source's
    memory."""

    here: Here
    group: int
    num_blocks: int
    slot: int
    note: bytes = b""
    payload: memoryview[Any] | None = None
    checksum: int | None = None

    @property
    def num_bytes(self) -> int:
        """Size of its blocks."""
        return self.num_blocks * self.here.kv.block_num_bytes[self.group]

    def noted_blocks(self, num_blocks: int) -> list[int]:
        """The source's blocks, where the note is their ids.

        Args:
            num_blocks: how many blocks the source has.

        Raises:
            ValueError: if the note is something else.
        """
        try:
            found = msgspec.msgpack.decode(self.note, type=list[int])
        except msgspec.DecodeError as error:
            raise ValueError(f"the note names no blocks: {error}") from error
        if len(found) != self.num_blocks or not all(0 <= each < num_blocks for each in found):
            raise ValueError(f"the note names other blocks than {self.num_blocks} of {num_blocks}")
        return found

    def scatter(self, staging: Staging) -> Write:
        """How to write the bytes that have come.

        Raises:
            ValueError: if they are too few, or not those that were sent.
        """
        if len(staging.content) < self.num_bytes:
            raise ValueError(f"{self.num_bytes} bytes announced, {len(staging.content)} sent")
        part = Staging(
            content=staging.content[: self.num_bytes], ring=staging.ring, slot=staging.slot
        )
        if self.checksum is not None and checksum_of(part.content) != self.checksum:
            raise ValueError("the bytes are not those that were sent")

        async def write(block_ids: Sequence[int]) -> float:
            return await self.here.kv.scatter(self.group, block_ids, part)

        return write


class Transport(ABC):
    """One end of a connection. ``offer``, ``connect`` and ``send`` are the source's, ``accept`` and
    ``receive`` the destination's; all run on the migrator's loop, which they must not hold up.

    ``name`` is that of the table. With ``is_automatic`` it is tried if no transport was chosen.
    """

    name: ClassVar[str]
    is_automatic: ClassVar[bool] = True

    def __init__(self, here: Here) -> None:
        self.here = here

    def offer(self) -> bytes:
        """Offer to the destination: all that it has to know.

        Raises:
            Unavailable: if this instance cannot send in this way.
        """
        return b""

    @abstractmethod
    async def accept(self, offer: bytes) -> bytes:
        """Get ready to receive; returns what the source has to know.

        Raises:
            Unavailable: if this instance cannot receive in this way, or the offer makes no sense.
        """

    async def connect(self, answer: bytes) -> None:
        """Get ready to send: the destination has accepted, and says ``answer``.

        Raises:
            Unavailable: if the two do not come together.
        """
        return

    @abstractmethod
    async def send(self, part: OutgoingPart) -> None:
        """Announce a part, and have its bytes on their way.

        Raises:
            RuntimeError: if nothing gets through any more; the two shake hands again then.
        """

    async def flush(self) -> None:
        """Wait until every part has left. Raises as ``send`` does."""
        return

    @abstractmethod
    async def receive(self, part: IncomingPart) -> Write:
        """Take in the next part; called once for each, even if nobody wants its blocks any more.

        Returns:
            what puts the part into blocks; raises ``Broken`` if nothing gets through any more.

        Raises:
            ValueError: if the part is not what it should be; the others may be.
            OSError: likewise.
            RuntimeError: if nothing gets through any more.
        """

    def close(self) -> None:
        """Let go of everything, without waiting for anything."""
        return


def checksum_of(content: torch.Tensor) -> int:
    """CRC-32 of the bytes."""
    return zlib.crc32(content.cpu().numpy().data)
