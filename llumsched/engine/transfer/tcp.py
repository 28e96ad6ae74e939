"""Blocks as a second frame of the message that announces them: between any two instances.

The bytes go over the connection of the migration protocol, encrypted as its messages are.
"""

from __future__ import annotations

from llumsched.engine.transfer.shared_ring import Staging, bytes_of
from llumsched.engine.transfer.transport import IncomingPart, OutgoingPart, Transport, Write


class Tcp(Transport):
    """The slot's memory goes to the socket as it is, not copied in Python."""

    name = "tcp"

    async def accept(self, offer: bytes) -> bytes:
        return b""

    async def connect(self, answer: bytes) -> None:
        self.here.ring.prepare()

    async def send(self, part: OutgoingPart) -> None:
        staging = await part.gather()
        await part.announce(payload=staging.content.numpy().data)

    async def receive(self, part: IncomingPart) -> Write:
        if part.payload is None:
            raise ValueError("no bytes came with the blocks")
        return part.scatter(Staging(content=bytes_of(part.payload)))
