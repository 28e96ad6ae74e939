"""Requests on their way in: the destination's executor of its transition table.

The table (``core.migration_destination``) decides; this carries its commands out on the engine
and on the link, and turns messages, the engine's answers and the clock into events. Every
method runs on the migrator's loop, so events are handled one at a time, in order.

Invariant: blocks are written only while their reservation holds them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from llumsched.core.migration.destination import machine as protocol
from llumsched.engine.base import CannotMigrate, FinalState, MigrationEngine, RequestState
from llumsched.migration.messages import (
    AbortMigrated,
    Commit,
    CommitAnswer,
    MigrationClosed,
    PeerMessage,
    QueryCommit,
    ReleaseReservation,
    Reserve,
    Reserved,
    ReserveRejected,
    StageStored,
    StoreBlocks,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
Reply = Callable[[PeerMessage], Awaitable[None]]

GRAMMAR_TIMEOUT_S = 4.0
# A client waits for the step that begins with a commit. Whatever else this process does then takes
# the interpreter, and where cores are few the core, from it; nobody waits for the answer.
ANSWER_AFTER_S = 0.04
# The answer says when the request went on: with its next token here, if that comes so soon.
NEXT_TOKEN_WITHIN_S = 1.0


@dataclass(slots=True)
class _Arriving:
    """State of the executor beside the table's record."""

    record: protocol.Reservation
    reply: Reply
    state: bytes = b""
    final: bytes = b""
    block_ids: list[int] = field(default_factory=list)
    is_allocated: bool = False
    refusal: str = ""
    room: asyncio.Event = field(default_factory=asyncio.Event)
    blocks_begun: set[int] = field(default_factory=set)
    blocks_written: set[int] = field(default_factory=set)
    num_writing: int = 0
    timer: asyncio.TimerHandle | None = None
    committed: Future[Future[None]] | None = None
    """The engine's, of the request's next token: it has taken the request over."""
    next_token_at_s: float | None = None
    """When that token was there, by ``time.perf_counter()``."""

    @property
    def is_committed(self) -> bool:
        return (
            self.committed is not None
            and self.committed.done()
            and self.committed.exception() is None
        )

    @property
    def num_reserved_blocks(self) -> int:
        """Reserved blocks that are not the request's own yet."""
        return 0 if self.is_committed else len(self.block_ids)


class IncomingMigrations:
    """All migrations into one instance.

    Args:
        call: runs a closure on the engine's loop thread.
        abort: treats a request as aborted by its client.
    """

    def __init__(
        self,
        *,
        port: MigrationEngine,
        call: Callable[[Callable[[], Any]], Future[Any]],
        abort: Callable[[str], None],
        options: protocol.ReservationOptions,
    ) -> None:
        self._port = port
        self._call = call
        self._abort = abort
        self._options = options
        self._arriving: dict[str, _Arriving] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_reserved(self) -> int:
        return sum(bool(arriving.num_reserved_blocks) for arriving in self._arriving.values())

    @property
    def num_reserved_blocks(self) -> int:
        return sum(arriving.num_reserved_blocks for arriving in self._arriving.values())

    def may_leave(self, request_id: str) -> bool:
        """True if a request that came here may move on: its source must know that it arrived."""
        return all(
            arriving.record.may_move_on or arriving.record.request_id != request_id
            for arriving in self._arriving.values()
        )

    def is_admitting(self, migration_id: str) -> bool:
        """True if the engine is taking the request over, and a client waits for its step."""
        arriving = self._arriving.get(migration_id)
        return arriving is not None and arriving.record.state is protocol.ReservationState.ADMITTING

    # ---- messages -------------------------------------------------------------------------

    def take_in(self, message: PeerMessage, reply: Reply) -> None:
        """A message of a source, other than blocks."""
        match message:
            case Reserve():
                arriving = self._record(message.migration_id, reply)
                arriving.state = message.state
                self._post(
                    protocol.ReservationRequested(
                        migration_id=message.migration_id,
                        request_id=message.request_id,
                        source=message.source,
                    )
                )
            case Commit():
                self._record(message.migration_id, reply).final = message.final
                self._post(
                    protocol.CommitRequested(
                        migration_id=message.migration_id, num_blocks=message.num_blocks
                    )
                )
            case QueryCommit():
                self._record(message.migration_id, reply)
                self._post(protocol.CommitQueried(migration_id=message.migration_id))
            case ReleaseReservation():
                self._record(message.migration_id, reply)
                self._post(protocol.ReleaseRequested(migration_id=message.migration_id))
            case MigrationClosed():
                self._record(message.migration_id, reply)
                self._post(protocol.MigrationClosed(migration_id=message.migration_id))
            case AbortMigrated():
                self._record(message.migration_id, reply)
                self._post(
                    protocol.AbortRequested(
                        migration_id=message.migration_id, request_id=message.request_id
                    )
                )
            case _:
                logger.warning("Dropped a request that is none: %s", type(message).__name__)

    async def store(
        self, message: StoreBlocks, reply: Reply, write: Callable[[list[int]], Awaitable[None]]
    ) -> None:
        """Blocks of a stage have come; ``write`` puts them into the blocks of these ids."""
        arriving = self._announced(message, reply)
        if not self._is_receiving(arriving, message.stage):
            return
        await arriving.room.wait()
        record = arriving.record
        if not self._is_receiving(arriving, message.stage):
            return
        end = message.first_block + message.num_blocks
        if not record.first_block <= message.first_block < end <= len(arriving.block_ids):
            self._fail(message, f"blocks {message.first_block} to {end} are not of this stage")
            return
        if message.first_block in arriving.blocks_begun:
            return  # doubled on the link; its slot may hold other blocks by now
        arriving.blocks_begun.update(range(message.first_block, end))
        arriving.num_writing += 1
        try:
            await write(arriving.block_ids[message.first_block : end])
        except RuntimeError as error:
            self._fail(message, str(error))
            return
        finally:
            arriving.num_writing -= 1
            self._cancel_unused(arriving, record.request_id)
        if not self._is_receiving(arriving, message.stage):
            return
        arriving.blocks_written.update(range(message.first_block, end))
        if len(arriving.blocks_written) == record.num_stage_blocks:
            self._post(
                protocol.BlocksWritten(
                    migration_id=message.migration_id,
                    stage=message.stage,
                    num_blocks_total=record.first_block + record.num_stage_blocks,
                )
            )

    def cannot_write(self, message: StoreBlocks, reply: Reply, reason: str) -> None:
        """Blocks of a stage have come, but not their bytes: the migration ends, here and there."""
        if self._is_receiving(self._announced(message, reply), message.stage):
            self._fail(message, reason)

    def _fail(self, message: StoreBlocks, reason: str) -> None:
        self._post(protocol.AllocationFailed(migration_id=message.migration_id, reason=reason))

    def _announced(self, message: StoreBlocks, reply: Reply) -> _Arriving:
        """The record, to which the first part of a stage has announced it."""
        arriving = self._record(message.migration_id, reply)
        announced = protocol.StageAnnounced(
            migration_id=message.migration_id,
            stage=message.stage,
            first_block=message.stage_first_block,
            num_blocks=message.stage_num_blocks,
        )
        if protocol.is_current(arriving.record, announced):
            arriving.room.clear()
            arriving.blocks_begun = set()
            arriving.blocks_written = set()
            self._post(announced)
        return arriving

    def _is_receiving(self, arriving: _Arriving, stage: int) -> bool:
        record = arriving.record
        if record.state is protocol.ReservationState.ABSENT:
            self._forget(record.migration_id)
        return record.takes_blocks and record.stage == stage

    def source_gone(self, source: str) -> None:
        """The process of a source is known to be dead."""
        for migration_id, arriving in list(self._arriving.items()):
            if arriving.record.source == source:
                self._post(
                    protocol.SourceLost(
                        migration_id=migration_id, reason=f"instance {source} died", is_dead=True
                    )
                )

    def give_up(self, request_id: str) -> None:
        """The request goes on without what is arriving of it: its source was declared dead."""
        for migration_id, arriving in list(self._arriving.items()):
            if arriving.record.request_id == request_id:
                self._post(
                    protocol.SourceLost(
                        migration_id=migration_id, reason="the request was resumed", is_dead=True
                    )
                )

    # ---- the table ------------------------------------------------------------------------

    def _record(self, migration_id: str, reply: Reply) -> _Arriving:
        arriving = self._arriving.get(migration_id)
        if arriving is None:
            arriving = _Arriving(protocol.absent(migration_id), reply)
            self._arriving[migration_id] = arriving
        arriving.reply = reply
        return arriving

    def _post(self, event: protocol.ReservationEvent) -> None:
        arriving = self._arriving.get(event.migration_id)
        if arriving is None or not protocol.is_current(arriving.record, event):
            return
        before = arriving.record
        try:
            arriving.record, commands = protocol.advance(before, event)
        except protocol.IllegalTransition as error:
            # A source that breaks the protocol harms its own migration only.
            logger.error("Migration %s: %s", event.migration_id, error)
            return
        for command in commands:
            self._execute(arriving, command)
        after = arriving.record
        if protocol.restarts_timer(before, event, after):
            self._arm(arriving)
        if not after.takes_blocks:
            arriving.room.set()  # whoever still waits to write finds that it may not
        if after.state is protocol.ReservationState.ABSENT:
            self._forget(event.migration_id)

    def _arm(self, arriving: _Arriving) -> None:
        if arriving.timer is not None:
            arriving.timer.cancel()
        record = arriving.record
        timeout_s = protocol.timeout_s(record, self._options)
        if timeout_s is not None:
            expired = protocol.ReservationExpired(
                migration_id=record.migration_id, state=record.state, stage=record.stage
            )
            loop = asyncio.get_running_loop()
            arriving.timer = loop.call_later(timeout_s, self._post, expired)

    def _forget(self, migration_id: str) -> None:
        arriving = self._arriving.pop(migration_id, None)
        if arriving is not None and arriving.timer is not None:
            arriving.timer.cancel()

    # ---- commands -------------------------------------------------------------------------

    def _execute(self, arriving: _Arriving, command: protocol.ReservationCommand) -> None:
        migration_id, request_id = command.migration_id, command.request_id
        match command:
            case protocol.AllocateBlocks():
                self._spawn(self._allocate(arriving, migration_id))
            case protocol.ReceiveBlocks():
                num_blocks = command.first_block + command.num_blocks
                if num_blocks <= len(arriving.block_ids):
                    arriving.room.set()
                else:
                    self._spawn(self._grow(arriving, migration_id, request_id, num_blocks))
            case protocol.AdmitRequest():
                self._admit(arriving, migration_id, request_id)
            case protocol.FreeBlocks():
                self._free(arriving, request_id)
            case protocol.AbortRequest():
                self._abort(request_id)
            case protocol.ConfirmReservation():
                self._answer(
                    arriving,
                    Reserved(
                        migration_id=migration_id, num_cached_blocks=command.num_cached_blocks
                    ),
                )
            case protocol.RejectReservation():
                self._answer(
                    arriving,
                    ReserveRejected(
                        migration_id=migration_id, reason=command.reason, refusal=arriving.refusal
                    ),
                )
            case protocol.ConfirmCopy():
                self._answer(
                    arriving,
                    StageStored(
                        migration_id=migration_id,
                        stage=command.stage,
                        num_blocks_total=command.num_blocks_total,
                    ),
                )
            case protocol.AcknowledgeCommit():
                now_s = time.perf_counter()
                held_back_s = now_s - (arriving.next_token_at_s or now_s)
                self._answer(
                    arriving, CommitAnswer(migration_id=migration_id, held_back_s=held_back_s)
                )
            case protocol.RefuseCommit():
                self._answer(
                    arriving, CommitAnswer(migration_id=migration_id, refused=command.reason)
                )
            case _:
                raise AssertionError(f"no such command: {command}")

    async def _allocate(self, arriving: _Arriving, migration_id: str) -> None:
        request_id = arriving.record.request_id
        try:
            state = msgspec.msgpack.decode(arriving.state, type=RequestState)
            reservation = await self._engine(lambda: self._port.reserve(state))
            arriving.state = b""
            arriving.is_allocated = True
            arriving.block_ids = reservation.block_ids
            if arriving.record.state is not protocol.ReservationState.ALLOCATING:
                self._free(arriving, request_id)  # given up while the engine was at it
                return
            if reservation.grammar is not None:
                async with asyncio.timeout(GRAMMAR_TIMEOUT_S):
                    await asyncio.wrap_future(reservation.grammar)
        except Exception as error:
            self._free(arriving, request_id)
            reason = str(error) or type(error).__name__
            if isinstance(error, CannotMigrate):
                arriving.refusal = error.refusal.value
            else:
                logger.warning("Reservation of migration %s failed: %r", migration_id, error)
            self._post(protocol.AllocationFailed(migration_id=migration_id, reason=reason))
            return
        self._post(
            protocol.BlocksAllocated(
                migration_id=migration_id, num_cached_blocks=reservation.num_cached_blocks
            )
        )

    def _free(self, arriving: _Arriving, request_id: str) -> None:
        """Give back what this migration, and no other of the same request, has reserved."""
        if arriving.is_allocated:
            arriving.is_allocated = False
            arriving.block_ids = []
            self._cancel_unused(arriving, request_id)

    def _cancel_unused(self, arriving: _Arriving, request_id: str) -> None:
        """Blocks that were given up are free once no worker writes them any more."""
        if not arriving.is_allocated and not arriving.num_writing:
            self._call(lambda: self._port.cancel(request_id))

    async def _grow(
        self, arriving: _Arriving, migration_id: str, request_id: str, num_blocks: int
    ) -> None:
        try:
            block_ids = await self._engine(lambda: self._port.grow(request_id, num_blocks))
        except CannotMigrate as error:
            self._post(protocol.AllocationFailed(migration_id=migration_id, reason=str(error)))
            return
        if arriving.record.takes_blocks:
            arriving.block_ids = block_ids
            arriving.room.set()

    def _admit(self, arriving: _Arriving, migration_id: str, request_id: str) -> None:
        final_state = arriving.final

        def note(_: Future[None]) -> None:
            arriving.next_token_at_s = time.perf_counter()

        def commit() -> Future[None]:
            final = msgspec.msgpack.decode(final_state, type=FinalState)
            self._port.commit(request_id, final)
            # Without KV it waits for its turn, and nobody for an answer that tells when that came.
            num_tokens = len(final.output_token_ids) + (final.num_computed_tokens > 0)
            next_token = self._port.await_output(request_id, num_tokens)
            next_token.add_done_callback(note)
            return next_token

        arriving.committed = self._call(commit)
        self._spawn(self._admitted(arriving, migration_id, arriving.committed))

    async def _admitted(
        self, arriving: _Arriving, migration_id: str, committed: Future[Future[None]]
    ) -> None:
        await asyncio.sleep(ANSWER_AFTER_S)
        try:
            next_token = await asyncio.wrap_future(committed)
        except Exception as error:
            logger.warning("Commit of migration %s failed: %r", migration_id, error)
            self._post(protocol.AdmissionFailed(migration_id=migration_id, reason=str(error)))
            return
        arriving.is_allocated = False  # the blocks are the request's own now
        arriving.block_ids = []
        await asyncio.wait([asyncio.wrap_future(next_token)], timeout=NEXT_TOKEN_WITHIN_S)
        self._post(protocol.RequestAdmitted(migration_id=migration_id))

    # ---- helpers --------------------------------------------------------------------------

    def _answer(self, arriving: _Arriving, message: PeerMessage) -> None:
        async def send() -> None:
            await arriving.reply(message)

        self._spawn(send())

    async def _engine(self, function: Callable[[], T]) -> T:
        result: T = await asyncio.wrap_future(self._call(function))
        return result

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
