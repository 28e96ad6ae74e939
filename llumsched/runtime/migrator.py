"""The migrator of an instance: its door to the other instances.

One thread with an asyncio loop runs all migrations of an instance, in and out. Each instance
binds one ROUTER, on which sources reach it, and connects one DEALER to every destination it
has moved a request to. Messages are checked on decoding; KV bytes go through a shared ring
where both ends are on one host, else as a frame of the message.

What this does not know: when a migration may do what (``core.migration``), and what the
engine must do for it (``engine``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec
import torch
import zmq
import zmq.asyncio

from llumsched.core import migration as protocol
from llumsched.core.events import MigrationOutcome
from llumsched.core.migration_destination import ReservationOptions
from llumsched.engine.kv_transfer import ReceiveRing, RingOffer, SendRing
from llumsched.engine.vllm.kv import KVBlocks
from llumsched.engine.vllm.migration import MigrationPort
from llumsched.runtime.incoming import IncomingMigrations, Reply
from llumsched.runtime.messages import (
    CommitAnswer,
    Hello,
    MigrationClosed,
    OrderMigration,
    PeerMessage,
    ReportMigration,
    Reserved,
    ReserveRejected,
    SlotRead,
    StageStored,
    StoreBlocks,
    Welcome,
    decode_peer,
    encode,
)
from llumsched.runtime.outgoing import OutgoingMigration

logger = logging.getLogger(__name__)

# A slot holds as many blocks as fit here, at least one: large enough that a message costs little
# beside the copy, small enough that a gather overlaps the receiver's scatter.
SLOT_NUM_BYTES = 4 << 20
NUM_SLOTS = 4
HANDSHAKE_TIMEOUT_S = 5.0


class PeerRefused(Exception):
    """The other instance cannot be reached or cannot take KV from this one."""


class Migrator:
    """Runs on its own event loop; ``migrate`` and ``peer_gone`` must be called on it.

    Args:
        instance_id: this instance.
        fingerprint: two instances exchange KV only if theirs are equal.
        call: runs a closure on the engine's loop thread.
        host: the address to bind, reachable by the other instances.
        step_time_s: the engine's recent step time, for the statistics.
    """

    def __init__(
        self,
        *,
        instance_id: str,
        fingerprint: str,
        port: MigrationPort,
        call: Callable[[Callable[[], Any]], Future[Any]],
        abort: Callable[[str], None],
        host: str,
        step_time_s: Callable[[], float],
        options: protocol.MigrationOptions,
    ) -> None:
        self.instance_id = instance_id
        self._fingerprint = fingerprint
        self._port = port
        self._call = call
        self._step_time_s = step_time_s
        self._options = options
        self._context = zmq.asyncio.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.bind(f"tcp://{host}:*")
        self.endpoint: str = self._router.get_string(zmq.LAST_ENDPOINT)
        self._links: dict[str, _Link] = {}
        self._ring: SendRing | None = None
        self._outgoing: dict[str, OutgoingMigration] = {}
        self._sessions: dict[bytes, _Session] = {}
        self._incoming = IncomingMigrations(
            port=port, call=call, abort=abort, options=ReservationOptions()
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        port.on_lost = self._on_lost
        self._receiving = asyncio.create_task(self._receive())

    @property
    def num_outgoing(self) -> int:
        return len(self._outgoing)

    @property
    def num_incoming(self) -> int:
        return self._incoming.num_reserved

    @property
    def num_reserved_blocks(self) -> int:
        return self._incoming.num_reserved_blocks

    async def close(self) -> None:
        """Close every socket; migrations under way are dropped, as if the process had died."""
        self._receiving.cancel()
        for task in list(self._tasks):
            task.cancel()
        for link in self._links.values():
            link.close()
        self._router.close(linger=0)
        if self._ring is not None:
            self._ring.close()
        self._context.term()

    # ---- source ---------------------------------------------------------------------------

    async def migrate(self, order: OrderMigration, request_id: str | None) -> ReportMigration:
        """Move one request as ordered, or say why not."""
        if request_id is None:
            return self._refused(order, None, MigrationOutcome.NOTHING_TO_MOVE, "nothing can move")
        if any(request_id == other.request_id for other in self._outgoing.values()):
            return self._refused(
                order, request_id, MigrationOutcome.REFUSED, "the request is being migrated already"
            )
        if not self._incoming.may_leave(request_id):
            return self._refused(
                order, request_id, MigrationOutcome.REFUSED, "the request has only just arrived"
            )
        if self._port.refusal is not None or self._port.kv is None:
            reason = f"this instance cannot migrate: {self._port.refusal}"
            return self._refused(order, request_id, MigrationOutcome.REFUSED, reason)
        try:
            link = await self._link(order.destination, order.destination_endpoint, self._port.kv)
        except PeerRefused as error:
            return self._refused(order, request_id, MigrationOutcome.REFUSED, str(error))
        outgoing = OutgoingMigration(
            migration_id=order.migration_id,
            request_id=request_id,
            source=self.instance_id,
            destination=order.destination,
            port=self._port,
            call=self._call,
            link=link,
            step_time_s=self._step_time_s,
            block_num_bytes=self._port.kv.block_num_bytes,
            options=self._options,
        )
        self._outgoing[order.migration_id] = outgoing
        try:
            return await outgoing.run()
        finally:
            del self._outgoing[order.migration_id]

    def peer_gone(self, instance_id: str) -> None:
        """The process of another instance is known to be dead."""
        for outgoing in self._outgoing.values():
            if outgoing.destination == instance_id:
                outgoing.post(
                    protocol.PeerLost(
                        migration_id=outgoing.migration_id,
                        reason=f"instance {instance_id} died",
                        is_dead=True,
                    )
                )
        link = self._links.pop(instance_id, None)
        if link is not None:
            link.close()
        self._incoming.source_gone(instance_id)

    def _refused(
        self,
        order: OrderMigration,
        request_id: str | None,
        outcome: MigrationOutcome,
        reason: str,
    ) -> ReportMigration:
        return ReportMigration(
            migration_id=order.migration_id,
            request_id=request_id,
            source=self.instance_id,
            destination=order.destination,
            outcome=outcome.value,
            reason=reason,
        )

    def _on_lost(self, request_id: str, what: str) -> None:
        """Called on the engine's loop thread."""

        def tell() -> None:
            for outgoing in self._outgoing.values():
                if outgoing.request_id == request_id:
                    outgoing.lost(what)

        self._loop.call_soon_threadsafe(tell)

    async def _link(self, destination: str, endpoint: str, kv: KVBlocks) -> _Link:
        link = self._links.get(destination)
        if link is None or link.endpoint != endpoint:
            if self._ring is None:
                blocks_per_slot = max(1, SLOT_NUM_BYTES // kv.block_num_bytes)
                self._ring = SendRing(
                    num_slots=NUM_SLOTS, slot_num_bytes=blocks_per_slot * kv.block_num_bytes
                )
            link = self._links[destination] = _Link(
                self._context, endpoint, self._ring, kv, self._on_answer
            )
        try:
            await link.open(self.instance_id, self._fingerprint)
        except PeerRefused:
            self._links.pop(destination, None)
            link.close()
            raise
        return link

    def _on_answer(self, message: PeerMessage) -> bool:
        """An answer from a destination; whether it was to a migration that goes on."""
        outgoing = self._outgoing.get(getattr(message, "migration_id", ""))
        if outgoing is None:
            return False
        migration_id = outgoing.migration_id
        match message:
            case Reserved():
                outgoing.reserved(message.num_cached_blocks)
            case ReserveRejected():
                outgoing.post(
                    protocol.ReservationRejected(migration_id=migration_id, reason=message.reason)
                )
            case StageStored():
                outgoing.stored(message.stage, message.num_blocks_total)
            case CommitAnswer(refused=None):
                outgoing.post(protocol.CommitAcknowledged(migration_id=migration_id))
            case CommitAnswer():
                outgoing.post(
                    protocol.CommitRefused(migration_id=migration_id, reason=message.refused or "")
                )
            case _:
                logger.warning("Dropped an answer that is none: %s", type(message).__name__)
        return True

    # ---- destination ----------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            identity, *frames = await self._router.recv_multipart(copy=False)
            try:
                message = decode_peer(frames[0].buffer)
            except (msgspec.DecodeError, IndexError) as error:
                logger.warning("Dropped a malformed message of another instance: %s", error)
                continue
            payload = frames[1].buffer if len(frames) > 1 else None
            task = asyncio.create_task(self._handle(identity.bytes, message, payload))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _handle(
        self, identity: bytes, message: PeerMessage, payload: memoryview | None
    ) -> None:
        async def reply(answer: PeerMessage) -> None:
            await self._router.send_multipart([identity, encode(answer)])

        match message:
            case Hello():
                await reply(self._welcome(identity, message))
            case StoreBlocks():
                try:
                    await self._store(identity, message, payload, reply)
                finally:
                    await reply(SlotRead(slot=message.slot))
            case _:
                self._incoming.take_in(message, reply)

    def _welcome(self, identity: bytes, hello: Hello) -> Welcome:
        if self._port.refusal is not None or self._port.kv is None:
            return Welcome(shared_memory=False, refused=f"it cannot migrate: {self._port.refusal}")
        if hello.fingerprint != self._fingerprint:
            return Welcome(
                shared_memory=False,
                refused=f"KV caches differ: {hello.fingerprint} here {self._fingerprint}",
            )
        offer = RingOffer(
            boot_id=hello.boot_id,
            pid=hello.pid,
            fd=hello.fd,
            inode=hello.inode,
            num_slots=hello.num_slots,
            slot_num_bytes=hello.slot_num_bytes,
        )
        ring: ReceiveRing | None = None
        if not os.environ.get("LLUMSCHED_NO_SHARED_MEMORY"):
            with contextlib.suppress(OSError):
                ring = ReceiveRing(offer)
        self._sessions[identity] = _Session(ring)
        return Welcome(shared_memory=ring is not None)

    async def _store(
        self, identity: bytes, message: StoreBlocks, payload: memoryview | None, reply: Reply
    ) -> None:
        kv, session = self._port.kv, self._sessions.get(identity)
        if kv is None or session is None:
            logger.warning("Dropped blocks of an instance that has not said hello")
            return

        def write(block_ids: list[int]) -> None:
            staging = session.staging(message.slot, payload)
            num_bytes = len(block_ids) * kv.block_num_bytes
            if len(block_ids) != message.num_blocks or len(staging) < num_bytes:
                raise ValueError(
                    f"{message.num_blocks} blocks announced, room for {len(block_ids)}, "
                    f"{len(staging)} bytes sent"
                )
            kv.scatter(block_ids, staging[:num_bytes])

        try:
            await self._incoming.store(message, reply, write)
        except (ValueError, IndexError) as error:
            logger.error("Migration %s: %s", message.migration_id, error)
            await reply(ReserveRejected(migration_id=message.migration_id, reason=str(error)))


class _Session:
    """What a source that said Hello sends blocks through."""

    def __init__(self, ring: ReceiveRing | None) -> None:
        self._ring = ring

    def staging(self, slot: int, payload: memoryview | None) -> torch.Tensor:
        if payload is not None:
            return torch.frombuffer(payload, dtype=torch.uint8)
        if self._ring is None:
            raise ValueError("no bytes came with the blocks, and no memory is shared")
        return self._ring.slot(slot)


class _Link:
    """The connection to one destination."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        endpoint: str,
        ring: SendRing,
        kv: KVBlocks,
        on_answer: Callable[[PeerMessage], bool],
    ) -> None:
        self.endpoint = endpoint
        self.transport = ""
        self._ring = ring
        self._kv = kv
        self._on_answer = on_answer
        self._socket = context.socket(zmq.DEALER)
        self._socket.connect(endpoint)
        self._slots_sent: set[int] = set()
        self._welcome: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()
        self._said_hello = False
        self._receiving = asyncio.create_task(self._receive())

    async def open(self, instance_id: str, fingerprint: str) -> None:
        """Shake hands, once; raises ``PeerRefused``."""
        if not self._said_hello:
            self._said_hello = True
            offer = self._ring.offer()
            await self.send(
                Hello(
                    instance_id=instance_id,
                    fingerprint=fingerprint,
                    boot_id=offer.boot_id,
                    pid=offer.pid,
                    fd=offer.fd,
                    inode=offer.inode,
                    num_slots=offer.num_slots,
                    slot_num_bytes=offer.slot_num_bytes,
                )
            )
        try:
            welcome = await asyncio.wait_for(asyncio.shield(self._welcome), HANDSHAKE_TIMEOUT_S)
        except TimeoutError:
            raise PeerRefused("the destination does not answer") from None
        if welcome.refused is not None:
            raise PeerRefused(f"the destination refuses: {welcome.refused}")
        self.transport = "shared memory" if welcome.shared_memory else "tcp"

    async def send(self, message: PeerMessage) -> None:
        await self._socket.send(encode(message))

    async def send_blocks(
        self, migration_id: str, stage: int, block_ids: list[int], first_block: int
    ) -> None:
        blocks_per_slot = self._ring.slot_num_bytes // self._kv.block_num_bytes
        for start in range(0, len(block_ids), blocks_per_slot):
            chunk = block_ids[start : start + blocks_per_slot]
            slot = await self._ring.acquire()
            self._slots_sent.add(slot)
            staging = self._ring.slot(slot)[: len(chunk) * self._kv.block_num_bytes]
            self._kv.gather(chunk, staging)
            frames: list[Any] = [
                encode(
                    StoreBlocks(
                        migration_id=migration_id,
                        stage=stage,
                        stage_first_block=first_block,
                        stage_num_blocks=len(block_ids),
                        first_block=first_block + start,
                        num_blocks=len(chunk),
                        slot=slot,
                    )
                )
            ]
            if self.transport == "tcp":
                frames.append(staging.numpy().data)
            await self._socket.send_multipart(frames, copy=self.transport != "tcp")

    def close(self) -> None:
        self._receiving.cancel()
        self._socket.close(linger=0)
        while self._slots_sent:
            self._ring.free(self._slots_sent.pop())

    async def _receive(self) -> None:
        while True:
            frame = await self._socket.recv()
            try:
                message = decode_peer(frame)
            except msgspec.DecodeError as error:
                logger.warning("Dropped a malformed answer: %s", error)
                continue
            if isinstance(message, Welcome):
                if not self._welcome.done():
                    self._welcome.set_result(message)
                continue
            if isinstance(message, SlotRead):
                if message.slot in self._slots_sent:
                    self._slots_sent.remove(message.slot)
                    self._ring.free(message.slot)
                continue
            if not self._on_answer(message) and isinstance(message, CommitAnswer):
                # The destination asks until it knows that its answer has come.
                await self.send(MigrationClosed(migration_id=message.migration_id))
