"""The connection to one destination, and what a destination keeps of one source.

A stage travels in parts of one staging slot each: gathered here, sent, scattered there, so the
three overlap. A slot belongs to its sender until the receiver has read it, or until the migration
it was for has ended: whoever reads it later than that writes into a reservation that can no longer
be committed. Therefore a receiver that hangs holds up its own migrations only.

What this does not know: when a migration may do what (``core.migration``).
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import torch
import zmq
import zmq.asyncio

from llumsched.engine.base import CannotMigrate, KVAccess, Refusal
from llumsched.engine.transfer.shared_ring import ReceiveRing, SendRing, Staging
from llumsched.engine.transfer.torch_channel import GroupChannel
from llumsched.migration.messages import (
    CommitAnswer,
    Hello,
    MigrationClosed,
    PeerMessage,
    SlotRead,
    StoreBlocks,
    Welcome,
    decode_peer,
)
from llumsched.migration.rate_limit import RateLimiter
from llumsched.wire.control import encode
from llumsched.wire.keys import PoolKeys

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0
GROUP_TIMEOUT_S = 30.0


class PeerConnection:
    """The way to one destination.

    Args:
        keys: the pool's.
        ring: this instance's staging memory, which all its links share.
        pacer: this instance's limit on bytes a second.
        on_answer: takes in an answer; whether it was to a migration that goes on.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        keys: PoolKeys,
        endpoint: str,
        ring: SendRing,
        kv: KVAccess,
        pacer: RateLimiter,
        *,
        checksum: bool,
        on_answer: Callable[[PeerMessage], bool],
    ) -> None:
        self.endpoint = endpoint
        self.transport = ""
        # No more bytes get through: the two have to shake hands again.
        self.is_broken = False
        self._ring = ring
        self._kv = kv
        self._pacer = pacer
        self._checksum = checksum
        self._on_answer = on_answer
        self._socket = context.socket(zmq.DEALER)
        # A connection that breaks and is made again is the same session to the destination.
        self._socket.setsockopt(zmq.ROUTING_ID, uuid.uuid4().hex.encode())
        keys.connect_with(self._socket)
        self._socket.connect(endpoint)
        # Slot -> which use of it is on its way, and the migration it is for.
        self._slots_sent: dict[int, tuple[int, str]] = {}
        self._num_uses = 0
        self._core_s = 0.0  # of the latest part
        self._channel: _Channel | None = None
        self._opening: asyncio.Task[None] | None = None
        self._welcome: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()
        self._receiving = asyncio.create_task(self._receive())

    async def open(self, instance_id: str, fingerprint: str, transport: str) -> None:
        """Shake hands, once.

        Raises:
            CannotMigrate: if the destination does not answer, or refuses.
        """
        if self._opening is None:
            self._opening = asyncio.create_task(
                self._shake_hands(instance_id, fingerprint, transport)
            )
        await asyncio.wait({self._opening})
        if self._opening.cancelled():
            # The link was closed meanwhile, not the caller stopped.
            raise CannotMigrate("the destination is gone", Refusal.UNREACHABLE)
        self._opening.result()

    async def _shake_hands(self, instance_id: str, fingerprint: str, transport: str) -> None:
        await self.send(
            Hello(
                instance_id=instance_id,
                fingerprint=fingerprint,
                transport=transport,
                ring=self._ring.offer(),
            )
        )
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                welcome = await self._welcome
        except TimeoutError:
            raise CannotMigrate("the destination does not answer", Refusal.UNREACHABLE) from None
        if welcome.refused is not None:
            raise CannotMigrate(f"the destination refuses: {welcome.refused}", Refusal.INCOMPATIBLE)
        if welcome.rendezvous:
            self._channel = _Channel(welcome.transport, welcome.rendezvous, is_sender=True)
            try:
                await self._channel.ready()
            except Exception as error:
                raise CannotMigrate(
                    f"no {welcome.transport} channel to the destination: {error}",
                    Refusal.UNREACHABLE,
                ) from error
        self.transport = welcome.transport

    async def send(self, message: PeerMessage) -> None:
        """Send, unless the link is closed: then its destination is dead and hears nothing."""
        if not self._socket.closed:
            await self._socket.send(encode(message))

    async def send_blocks(
        self,
        migration_id: str,
        stage: int,
        block_ids: list[int],
        first_block: int,
        *,
        is_final: bool,
    ) -> None:
        """Gather blocks and hand them over, part by part; returns when the last is sent."""
        blocks_per_slot = self._ring.slot_num_bytes // self._kv.block_num_bytes
        for start in range(0, len(block_ids), blocks_per_slot):
            part = block_ids[start : start + blocks_per_slot]
            num_bytes = len(part) * self._kv.block_num_bytes
            delay_s = self._pacer.delay_s(num_bytes, time.monotonic())
            if not is_final and delay_s > 0:
                await asyncio.sleep(delay_s)
            slot = await self._ring.acquire()
            self._num_uses += 1
            self._slots_sent[slot] = (self._num_uses, migration_id)
            staging = self._ring.staging(slot, num_bytes)
            begun_s = time.thread_time()
            others_s = await self._kv.gather(part, staging)
            header = encode(
                StoreBlocks(
                    migration_id=migration_id,
                    stage=stage,
                    stage_first_block=first_block,
                    stage_num_blocks=len(block_ids),
                    first_block=first_block + start,
                    num_blocks=len(part),
                    slot=slot,
                    use=self._num_uses,
                    checksum=checksum_of(staging.content) if self._checksum else None,
                )
            )
            await self._send_part(header, staging.content)
            # Where gathering is quick, the messages are as much of it.
            self._core_s = others_s + time.thread_time() - begun_s
            self._pacer.copied(self._core_s, time.monotonic())

    async def _send_part(self, header: bytes, content: torch.Tensor) -> None:
        if self._socket.closed:
            return
        if self.transport == "tcp":
            # The slot's memory goes to the socket as it is; it is free again when it was read.
            await self._socket.send_multipart([header, content.numpy().data], copy=False)
            return
        await self._socket.send(header)
        if self._channel is not None:
            try:
                await self._channel.send(content)
            except RuntimeError:
                self.is_broken = True
                raise

    def ended(self, migration_id: str) -> None:
        """A migration is over: the slots on its way are nobody's any more."""
        for slot, (_, owner) in list(self._slots_sent.items()):
            if owner == migration_id:
                self._take_back(slot)

    def _take_back(self, slot: int) -> None:
        del self._slots_sent[slot]
        self._ring.free(slot)

    def close(self) -> None:
        self._receiving.cancel()
        if self._opening is not None:
            self._opening.cancel()
        self._socket.close(linger=0)
        if self._channel is not None:
            self._channel.close()
        for slot in list(self._slots_sent):
            self._take_back(slot)

    async def _receive(self) -> None:
        while True:
            frame = await self._socket.recv()
            try:
                message = decode_peer(frame)
            except msgspec.DecodeError as error:
                logger.warning("Dropped a malformed answer: %s", error)
                continue
            match message:
                case Welcome():
                    if not self._welcome.done():
                        self._welcome.set_result(message)
                    elif message.refused is not None:
                        logger.warning("The link to %s broke: %s", self.endpoint, message.refused)
                        self.is_broken = True
                case SlotRead():
                    use, _ = self._slots_sent.get(message.slot, (None, ""))
                    if use == message.use:
                        self._take_back(message.slot)
                    # Neither end may be slowed down by more than its share.
                    more_s = message.core_s - self._core_s
                    if more_s > 0:
                        self._pacer.copied(more_s, time.monotonic())
                case _:
                    if not self._on_answer(message) and isinstance(message, CommitAnswer):
                        # The destination asks until it knows that its answer has come.
                        await self.send(MigrationClosed(migration_id=message.migration_id))


class Session:
    """Channel for the blocks of one source that said Hello."""

    def __init__(self, *, ring: ReceiveRing | None, channel: _Channel | None) -> None:
        self._ring = ring
        self._channel = channel

    async def staging(
        self, message: StoreBlocks, num_bytes: int, payload: memoryview | None
    ) -> Staging:
        """The bytes of a part. To be called once for each part, in the order they came.

        Raises:
            ValueError: if there are none, too few, or not those that were sent.
            IndexError: if the sender's ring has no such slot.
        """
        ring = None
        if payload is not None:
            content = torch.frombuffer(payload, dtype=torch.uint8)
        elif self._channel is not None:
            content = await self._channel.receive(num_bytes)
        elif self._ring is not None:
            content, ring = self._ring.slot(message.slot), self._ring.offer
        else:
            raise ValueError("no bytes came with the blocks, and no memory is shared")
        if len(content) < num_bytes:
            raise ValueError(f"{num_bytes} bytes announced, {len(content)} sent")
        content = content[:num_bytes]
        if message.checksum is not None and checksum_of(content) != message.checksum:
            raise ValueError("the bytes are not those that were sent")
        return Staging(content=content, ring=ring, slot=message.slot)

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()


class _Channel:
    """A ``GroupChannel`` on a thread of its own, for its calls block."""

    def __init__(self, backend: str, rendezvous: str, *, is_sender: bool) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-channel")
        self._opened = self._thread.submit(
            GroupChannel, backend, rendezvous, is_sender=is_sender, timeout_s=GROUP_TIMEOUT_S
        )

    async def ready(self) -> None:
        """Wait for the other end; raises what kept the two from meeting."""
        await asyncio.wrap_future(self._opened)

    async def send(self, staging: torch.Tensor) -> None:
        await self._run(lambda channel: channel.send(staging))

    async def receive(self, num_bytes: int) -> torch.Tensor:
        staging: torch.Tensor = await self._run(lambda channel: channel.receive(num_bytes))
        return staging

    async def _run(self, function: Callable[[GroupChannel], Any]) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: function(self._opened.result()))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def receiving_channel(backend: str, rendezvous: str) -> _Channel:
    """The receiver's end of a channel; the sender is told ``rendezvous``."""
    return _Channel(backend, rendezvous, is_sender=False)


def checksum_of(staging: torch.Tensor) -> int:
    """CRC-32 of the bytes."""
    return zlib.crc32(staging.cpu().numpy().data)
