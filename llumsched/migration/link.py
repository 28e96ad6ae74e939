"""The connection to one destination.

A stage travels in parts of one staging slot each, by the transport that the hand-shake chose: while
one is gathered, another is on its way and a third is scattered. A slot belongs to its sender until
the receiver has read it, or until the migration it was for has ended: whoever reads it later than
that writes into a reservation that can no longer be committed. Therefore a receiver that hangs
holds up its own migrations only.

What this does not know: when a migration may do what (``core.migration``).
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from llumsched.core.migration.messages import CopyBlocks, ToDestination, ToSource
from llumsched.engine.base import CannotMigrate, Refusal
from llumsched.engine.transfer.registry import offered
from llumsched.engine.transfer.transport import Here, OutgoingPart, Transport, Unavailable
from llumsched.logs import FailureLog
from llumsched.migration.messages import (
    Hello,
    SlotRead,
    StoreBlocks,
    Welcome,
    decode_peer,
    encode_peer,
)
from llumsched.migration.rate_limit import RateLimiter
from llumsched.migration.runs import Run
from llumsched.wire.keys import PoolKeys

logger = logging.getLogger(__name__)
_failures = FailureLog(logger)

HANDSHAKE_TIMEOUT_S = 5.0


class PeerConnection:
    """The way to one destination.

    Args:
        keys: the pool's.
        here: what transports may use of this instance; all its links share the staging memory.
        pacer: this instance's limit on bytes a second.
        on_answer: takes in an answer; what is to be said to that, if anything.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        keys: PoolKeys,
        endpoint: str,
        here: Here,
        pacer: RateLimiter,
        *,
        on_answer: Callable[[ToSource], ToDestination | None],
    ) -> None:
        self.endpoint = endpoint
        # No more bytes get through: the two have to shake hands again.
        self.is_broken = False
        self._here = here
        self._pacer = pacer
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
        self._transport: Transport | None = None
        self._opening: asyncio.Task[None] | None = None
        self._welcome: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()
        self._receiving = asyncio.create_task(self._receive())

    @property
    def transport(self) -> str:
        """The name of the transport; empty before the hand-shake."""
        return self._transport.name if self._transport is not None else ""

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
        try:
            ways = offered(self._here, transport)
        except Unavailable as error:
            raise CannotMigrate(f"no way to send blocks: {error}", Refusal.INCOMPATIBLE) from error
        try:
            await self.send(
                Hello(
                    instance_id=instance_id,
                    fingerprint=fingerprint,
                    transport=transport,
                    offers={name: offer for name, (_, offer) in ways.items()},
                )
            )
            self._transport = await self._connected(ways)
        finally:
            for way, _ in ways.values():
                if way is not self._transport:
                    way.close()

    async def _connected(self, ways: Mapping[str, tuple[Transport, bytes]]) -> Transport:
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                welcome = await asyncio.shield(self._welcome)
        except TimeoutError:
            raise CannotMigrate("the destination does not answer", Refusal.UNREACHABLE) from None
        if welcome.refused is not None:
            raise CannotMigrate(f"the destination refuses: {welcome.refused}", Refusal.INCOMPATIBLE)
        if welcome.transport not in ways:
            raise CannotMigrate(
                f"the destination answers with {welcome.transport}, which was not offered",
                Refusal.INCOMPATIBLE,
            )
        transport, _ = ways[welcome.transport]
        try:
            await transport.connect(welcome.answer)
        except Unavailable as error:
            raise CannotMigrate(
                f"{transport.name} does not reach the destination: {error}", Refusal.UNREACHABLE
            ) from error
        return transport

    async def send(self, message: ToDestination | Hello) -> None:
        """Send, unless the link is closed: then its destination is dead and hears nothing."""
        if not self._socket.closed:
            await self._socket.send(encode_peer(message))

    async def send_blocks(self, stage: CopyBlocks, num_tokens: int, runs: Sequence[Run]) -> None:
        """Hand a stage over, part by part; returns when the last has left.

        Args:
            num_tokens: tokens of the request in the blocks up to the stage's last.
            runs: the blocks of the stage that have content. Without any it is announced all the
                same.
        """
        transport, ring, kv = self._transport, self._here.ring, self._here.kv
        assert transport is not None, "open first"
        num_sent = sum(len(run.block_ids) for run in runs)
        for group, first_block, part_ids in self._parts(runs):
            num_bytes = len(part_ids) * kv.block_num_bytes[group]
            delay_s = self._pacer.delay_s(num_bytes, time.monotonic())
            if not stage.is_final and delay_s > 0:
                await asyncio.sleep(delay_s)
            slot = await ring.acquire()
            self._num_uses += 1
            self._slots_sent[slot] = (self._num_uses, stage.migration_id)
            message = StoreBlocks(
                migration_id=stage.migration_id,
                stage=stage.stage,
                stage_first_block=stage.first_block,
                stage_num_blocks=stage.num_blocks,
                stage_num_sent=num_sent,
                stage_num_tokens=num_tokens,
                group=group,
                first_block=first_block,
                num_blocks=len(part_ids),
                slot=slot,
                use=self._num_uses,
            )
            begun_s = time.thread_time()
            part = OutgoingPart(
                here=self._here,
                group=group,
                block_ids=part_ids,
                slot=slot,
                send=partial(self._announce, message),
            )
            await self._until_broken(transport.send(part))
            # Where gathering is quick, the messages are as much of it.
            self._core_s = part.core_s + time.thread_time() - begun_s
            self._pacer.copied(self._core_s, time.monotonic())
        await self._until_broken(transport.flush())

    def _parts(self, runs: Sequence[Run]) -> Iterator[tuple[int, int, list[int]]]:
        """Group, first place and block ids of each part: what of a run fits into a slot."""
        for run in runs:
            per_slot = self._here.ring.slot_num_bytes // self._here.kv.block_num_bytes[run.group]
            for start in range(0, len(run.block_ids), per_slot):
                yield run.group, run.first + start, run.block_ids[start : start + per_slot]
        if not runs:
            yield 0, 0, []

    async def _announce(
        self,
        message: StoreBlocks,
        *,
        note: bytes,
        payload: memoryview[Any] | None,
        checksum: int | None,
    ) -> None:
        if self._socket.closed:
            return
        header = encode_peer(msgspec.structs.replace(message, note=note, checksum=checksum))
        if payload is None:
            await self._socket.send(header)
        else:
            # The memory goes to the socket as it is; it is free again when it was read.
            await self._socket.send_multipart([header, payload], copy=False)

    async def _until_broken(self, sending: Awaitable[None]) -> None:
        try:
            await sending
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
        self._here.ring.free(slot)

    def close(self) -> None:
        self._receiving.cancel()
        if self._opening is not None:
            self._opening.cancel()
        self._socket.close(linger=0)
        if self._transport is not None:
            self._transport.close()
        for slot in list(self._slots_sent):
            self._take_back(slot)

    async def _receive(self) -> None:
        while True:
            frame = await self._socket.recv()
            try:
                message = decode_peer(frame)
            except msgspec.DecodeError as error:
                _failures.warned("answer", "Dropped a malformed answer: %s", error)
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
                case ToSource():
                    reply = self._on_answer(message)
                    if reply is not None:
                        await self.send(reply)
                case _:
                    kind = type(message).__name__
                    _failures.warned(kind, "Dropped an answer that is none: %s", kind)
