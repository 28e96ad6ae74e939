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
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from llumsched.core.events import MigrationOutcome
from llumsched.core.migration.destination.record import ReservationOptions
from llumsched.core.migration.messages import ToDestination, ToSource
from llumsched.core.migration.source.record import MigrationOptions
from llumsched.core.transfer_options import TransferOptions
from llumsched.engine.base import (
    MAX_STATE_NUM_BYTES,
    CannotMigrate,
    KVAccess,
    MigrationEngine,
    Refusal,
    StepAhead,
)
from llumsched.engine.compatibility import differences
from llumsched.engine.transfer.registry import accepted
from llumsched.engine.transfer.shared_ring import SendRing
from llumsched.engine.transfer.transport import Broken, Here, IncomingPart, Transport, Unavailable
from llumsched.logs import FailureLog
from llumsched.migration.destination import IncomingMigrations
from llumsched.migration.link import PeerConnection
from llumsched.migration.messages import (
    Hello,
    PeerMessage,
    SlotRead,
    StoreBlocks,
    Welcome,
    decode_peer,
    encode_peer,
)
from llumsched.migration.rate_limit import RateLimiter
from llumsched.migration.source import OutgoingMigrations
from llumsched.wire.control import OrderMigration, ReportMigration
from llumsched.wire.keys import MAX_CONTROL_NUM_BYTES, Gate, PoolKeys

logger = logging.getLogger(__name__)
_failures = FailureLog(logger)

Answer = ToSource | Welcome | SlotRead
Reply = Callable[[Answer], Awaitable[None]]

BYTES_PER_MB = 1_000_000
# To or from a GPU a copy costs a launch and a wait, however small it is.
CPU_SLOT_MB, GPU_SLOT_MB = 8.0, 64.0


class Migrator:
    """Runs on its own event loop; ``migrate`` and ``peer_gone`` must be called on it.

    Args:
        instance_id: this instance.
        call: runs a closure on the engine's loop thread.
        keys: the pool's.
        host: the address to bind, reachable by the other instances.
        step_time_s: the engine's recent step time.
        step_ahead: when the engine's next boundary between two steps comes.
        spoken_to: called at every message of another instance.
    """

    def __init__(
        self,
        *,
        instance_id: str,
        port: MigrationEngine,
        call: Callable[[Callable[[], Any]], Future[Any]],
        abort: Callable[[str], None],
        keys: PoolKeys,
        host: str,
        step_time_s: Callable[[], float],
        step_ahead: Callable[[], StepAhead],
        options: MigrationOptions,
        transfer: TransferOptions,
        spoken_to: Callable[[], None] = lambda: None,
    ) -> None:
        self._spoken_to = spoken_to
        self.instance_id = instance_id
        self._fingerprint = port.fingerprint()
        self._port = port
        self._host = host
        self._transfer = transfer
        self._pacer = RateLimiter(
            transfer.bandwidth_limit_mb_s * BYTES_PER_MB,
            # Beside a GPU a core waits for the copies, and no step waits for the core.
            transfer.core_share if port.kv is not None and port.kv.copies_on_cores else 1.0,
        )
        self._call = call
        self._context = zmq.asyncio.Context()
        self._keys = keys
        self._router = self._context.socket(zmq.ROUTER)
        # A source may connect again before it shows here that its old connection is gone.
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        # A part of a stage, or the state of a request.
        max_num_bytes = max(
            self._slot_num_bytes(port.kv), MAX_STATE_NUM_BYTES + MAX_CONTROL_NUM_BYTES
        )
        self.gate = Gate(self._context, keys, [(self._router, max_num_bytes)], instance_id)
        self._router.bind(f"tcp://{host}:*")
        self.endpoint: str = self._router.get_string(zmq.LAST_ENDPOINT)
        self._links: dict[str, PeerConnection] = {}
        self._here = self._what_transports_use(port.kv) if port.kv is not None else None
        # Sources that have said Hello: by their connection, which instance, and the way here.
        self._sources: dict[bytes, tuple[str, Transport]] = {}
        self._outgoing = OutgoingMigrations(
            instance_id=instance_id,
            port=port,
            call=call,
            step_time_s=step_time_s,
            block_num_bytes=port.kv.block_num_bytes if port.kv is not None else (),
            options=options,
        )
        self._incoming = IncomingMigrations(
            port=port,
            call=call,
            abort=abort,
            step_time_s=step_time_s,
            step_ahead=step_ahead,
            options=ReservationOptions(),
        )
        self._tasks: set[asyncio.Task[None]] = set()
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
        self.gate.close()
        for task in list(self._tasks):
            task.cancel()
        for link in self._links.values():
            link.close()
        for _, transport in self._sources.values():
            transport.close()
        self._router.close(linger=0)
        if self._here is not None:
            self._here.ring.close()
        self._context.term()

    # ---- source ---------------------------------------------------------------------------

    async def migrate(self, order: OrderMigration, request_id: str | None) -> ReportMigration:
        """Move one request as ordered, or say why not; whatever happens, there is a report."""
        if request_id is None:
            return self._report(
                order, None, MigrationOutcome.NOTHING_TO_MOVE, "nothing can move", phase="choosing"
            )
        try:
            report = await self._migrate(order, request_id)
        except CannotMigrate as error:
            report = self._report(
                order, request_id, MigrationOutcome.REFUSED, str(error), error.refusal
            )
        except Exception as error:
            logger.exception("Migration %s failed", order.migration_id)
            report = self._report(
                order, request_id, MigrationOutcome.ABORTED, f"failed: {error!r}", "failed"
            )
        if report.outcome != MigrationOutcome.COMMITTED:
            refusal = Refusal(report.cause) if report.cause in set(Refusal) else None
            self._call(lambda: self._port.rest(request_id, refusal or Refusal.NOT_TAKEN_OVER))
        return report

    async def _migrate(self, order: OrderMigration, request_id: str) -> ReportMigration:
        if any(request_id == other.request_id for other in self._outgoing):
            raise CannotMigrate("the request is being migrated already", Refusal.BEING_MIGRATED)
        if not self._incoming.may_leave(request_id):
            raise CannotMigrate("the request has only just arrived", Refusal.JUST_ARRIVED)
        if self._port.refusal is not None or self._port.kv is None or self._here is None:
            raise CannotMigrate(
                f"this instance cannot migrate: {self._port.refusal}", Refusal.UNSUPPORTED_ENGINE
            )
        link = await self._link(order.destination, order.destination_endpoint, self._here)
        try:
            return await self._outgoing.run(
                order.migration_id,
                request_id,
                order.destination,
                link,
                has_ended=order.has_ended,
            )
        finally:
            link.ended(order.migration_id)

    def peer_gone(self, instance_id: str) -> None:
        """The process of another instance is known to be dead."""
        reason = f"instance {instance_id} died"
        self._outgoing.peer_lost(instance_id, reason, is_dead=True)
        link = self._links.pop(instance_id, None)
        if link is not None:
            link.close()
        self._forget_source(instance_id)
        self._incoming.peer_lost(instance_id, reason, is_dead=True)

    def give_up_arrival(self, request_id: str) -> None:
        """End every migration by which a request arrives here."""
        self._incoming.give_up(request_id)

    def _report(
        self,
        order: OrderMigration,
        request_id: str | None,
        outcome: MigrationOutcome,
        reason: str,
        cause: str = "",
        phase: str = "starting",
    ) -> ReportMigration:
        return ReportMigration(
            migration_id=order.migration_id,
            request_id=request_id,
            source=self.instance_id,
            destination=order.destination,
            outcome=outcome.value,
            reason=reason,
            cause=cause,
            phase=phase,
            has_ended=order.has_ended,
        )

    def _slot_num_bytes(self, kv: KVAccess | None) -> int:
        """Parts large enough that a message costs little beside the copy, small enough that
        gathering one overlaps the receiver's scattering of another."""
        if kv is None:
            return 0
        slot_mb = self._transfer.staging_slot_mb or (
            CPU_SLOT_MB if kv.copies_on_cores else GPU_SLOT_MB
        )
        slot_num_bytes = int(slot_mb * BYTES_PER_MB)
        largest = max(kv.block_num_bytes)
        return max(1, slot_num_bytes // largest) * largest

    def _what_transports_use(self, kv: KVAccess) -> Here:
        return Here(
            kv=kv,
            ring=SendRing(
                num_slots=self._transfer.staging_slots,
                slot_num_bytes=self._slot_num_bytes(kv),
                pinned=kv.pins_staging,
            ),
            host=self._host,
            checksum=self._transfer.checksum,
        )

    async def _link(self, destination: str, endpoint: str, here: Here) -> PeerConnection:
        link = self._links.get(destination)
        if link is not None and link.is_broken:
            if any(other.destination == destination for other in self._outgoing):
                # Their destination may still have to be asked, over this link, what it committed.
                raise CannotMigrate(
                    "the link broke, and is made anew after the migrations that use it",
                    Refusal.UNREACHABLE,
                )
            del self._links[destination]
            link.close()
            link = None
        if link is None or link.endpoint != endpoint:
            if link is not None:
                link.close()
            link = self._links[destination] = PeerConnection(
                self._context,
                self._keys,
                endpoint,
                here,
                self._pacer,
                on_answer=self._outgoing.take_in,
            )
        try:
            await link.open(self.instance_id, self._fingerprint, self._transfer.transport)
        except CannotMigrate:
            if self._links.get(destination) is link:
                del self._links[destination]
                link.close()
            raise
        return link

    # ---- destination ----------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            identity, *frames = await self._router.recv_multipart(copy=False)
            try:
                message = decode_peer(frames[0].buffer)
            except (msgspec.DecodeError, IndexError) as error:
                said = "Dropped a malformed message of another instance: %s"
                _failures.warned("message", said, error)
                continue
            self._spoken_to()
            payload = frames[1].buffer if len(frames) > 1 else None
            task = asyncio.create_task(self._handle(identity.bytes, message, payload))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _handle(
        self, identity: bytes, message: PeerMessage, payload: memoryview | None
    ) -> None:
        async def reply(answer: Answer) -> None:
            if self._router.closed:
                return  # this instance ends, and the other learns that from the link
            await self._router.send_multipart([identity, encode_peer(answer)])

        match message:
            case Hello():
                await reply(await self._welcome(identity, message))
            case StoreBlocks():
                begun_s, others_s = time.thread_time(), 0.0
                try:
                    others_s = await self._store(identity, message, payload, reply)
                finally:
                    core_s = others_s + time.thread_time() - begun_s
                    if self._incoming.is_admitting(message.migration_id):
                        await asyncio.sleep(self._incoming.answer_after_s())
                    await reply(SlotRead(slot=message.slot, use=message.use, core_s=core_s))
            case ToDestination():
                self._incoming.take_in(message, reply)
            case _:
                kind = type(message).__name__
                _failures.warned(kind, "Dropped a request that is none: %s", kind)

    async def _welcome(self, identity: bytes, hello: Hello) -> Welcome:
        if self._port.refusal is not None or self._here is None:
            return Welcome(refused=f"it cannot migrate: {self._port.refusal}")
        differing = differences(self._fingerprint, hello.fingerprint)
        if differing:
            return Welcome(refused=f"the two are not alike: {differing}")
        if hello.transport != self._transfer.transport:
            return Welcome(
                refused=f"its transport is {self._transfer.transport}, the source's is "
                f"{hello.transport}"
            )
        self._forget_source(hello.instance_id)
        try:
            transport, answer = await accepted(self._here, hello.offers)
        except Unavailable as error:
            return Welcome(refused=f"there is no way for blocks between the two: {error}")
        self._sources[identity] = (hello.instance_id, transport)
        return Welcome(transport=transport.name, answer=answer)

    def _forget_source(self, instance_id: str) -> None:
        for identity, (source, transport) in list(self._sources.items()):
            if source == instance_id:
                del self._sources[identity]
                transport.close()

    async def _store(
        self, identity: bytes, message: StoreBlocks, payload: memoryview | None, reply: Reply
    ) -> float:
        """Returns the seconds of a core's time that it took of other processes."""
        if self._here is None or identity not in self._sources:
            await reply(Welcome(refused="blocks came before a hello"))
            return 0.0
        _, transport = self._sources[identity]
        part = IncomingPart(
            here=self._here,
            group=message.group,
            num_blocks=message.num_blocks,
            slot=message.slot,
            note=message.note,
            payload=payload,
            checksum=message.checksum,
        )
        try:
            if part.group >= len(self._here.kv.block_num_bytes):
                raise ValueError(f"there is no group {part.group} of blocks")
            if part.num_bytes > self._here.ring.slot_num_bytes:
                raise ValueError(f"{message.num_blocks} blocks in one part are too many")
            put = await transport.receive(part)
        except (ValueError, OSError, RuntimeError) as error:
            logger.error("Migration %s: %s", message.migration_id, error)
            self._incoming.cannot_write(message, reply, str(error))
            if isinstance(error, RuntimeError):
                await self._broke(identity, transport, error, reply)
            return 0.0
        others_s = 0.0

        async def write(block_ids: list[int]) -> None:
            nonlocal others_s
            try:
                others_s = await put(block_ids)
            except Broken as error:
                await self._broke(identity, transport, error, reply)
                raise

        await self._incoming.store(message, reply, write)
        return others_s

    async def _broke(
        self, identity: bytes, transport: Transport, error: RuntimeError, reply: Reply
    ) -> None:
        self._sources.pop(identity, None)
        transport.close()
        await reply(Welcome(refused=f"{transport.name} broke: {error}"))
