"""Blocks by way of memory that both processes have mapped: between instances of one host."""

from __future__ import annotations

import msgspec

from llumsched.engine.transfer.shared_ring import ReceiveRing, RingOffer, Staging
from llumsched.engine.transfer.transport import (
    IncomingPart,
    OutgoingPart,
    Transport,
    Unavailable,
    Write,
)


class SharedMemory(Transport):
    """The destination maps the source's staging memory and copies from it."""

    name = "shared_memory"
    _ring: ReceiveRing

    def offer(self) -> bytes:
        return msgspec.msgpack.encode(self.here.ring.offer())

    async def accept(self, offer: bytes) -> bytes:
        try:
            self._ring = ReceiveRing(
                msgspec.msgpack.decode(offer, type=RingOffer),
                pinned=self.here.kv.pins_staging,
            )
        except (OSError, msgspec.DecodeError) as error:
            raise Unavailable(f"no memory can be shared: {error}") from error
        return b""

    async def connect(self, answer: bytes) -> None:
        self.here.ring.prepare()

    async def send(self, part: OutgoingPart) -> None:
        await part.gather()
        await part.announce()

    async def receive(self, part: IncomingPart) -> Write:
        try:
            content = self._ring.slot(part.slot)
        except IndexError as error:
            raise ValueError(str(error)) from error
        return part.scatter(Staging(content=content, ring=self._ring.offer, slot=part.slot))
