"""Requests on their way in: the destination's host of the migration protocol.

The table (``core.migration.destination``) decides; this carries its commands out on the engine and
on the link, and turns messages, the engine's answers and the clock into events. Every method runs
on the migrator's loop, so events are handled one at a time, in order.

Invariant: blocks are written only while their reservation holds them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace

import msgspec

from llumsched.core.migration.destination import machine
from llumsched.core.migration.destination.events import (
    AbortRequest,
    AdmissionFailed,
    AdmitRequest,
    AllocateBlocks,
    AllocationFailed,
    BlocksAllocated,
    BlocksWritten,
    DestinationCommand,
    DestinationEvent,
    FreeBlocks,
    ReceiveBlocks,
    RequestAdmitted,
    ReservationState,
)
from llumsched.core.migration.destination.record import Reservation, ReservationOptions
from llumsched.core.migration.events import PeerLost
from llumsched.core.migration.groups import Place, order_of
from llumsched.core.migration.messages import (
    BlocksCopied,
    BlocksReserved,
    CommitAcknowledged,
    CommitRequest,
    CopyBlocks,
    ReservationRejected,
    ReserveBlocks,
    ToDestination,
    ToSource,
)
from llumsched.engine.base import (
    NO_BLOCK,
    BlockTables,
    CannotMigrate,
    FinalState,
    MigrationEngine,
    Refusal,
    RequestState,
    StepAhead,
)
from llumsched.migration.host import Call, MigrationHost
from llumsched.migration.messages import StoreBlocks

logger = logging.getLogger(__name__)

Reply = Callable[[ToSource], Awaitable[None]]
Write = Callable[[list[int]], Awaitable[None]]

GRAMMAR_TIMEOUT_S = 4.0
# A client waits for the step that begins with a commit. Whatever else this process does then takes
# the interpreter, and where cores are few the core, from it; nobody waits for the answer.
ANSWER_AFTER_STEPS = 1.25
MAX_ANSWER_AFTER_S = 0.04
# The answer says when the request went on: with its next token here, if that comes so soon.
NEXT_TOKEN_WITHIN_S = 1.0


class IncomingMigration(MigrationHost[Reservation, DestinationEvent, DestinationCommand]):
    """One migration at its destination.

    Args:
        call: runs a closure on the engine's loop thread.
        abort: treats a request as aborted by its client.
        forget: called when nothing of the migration need be known any more.
        answer_after_s: for how long an answer is held back that nobody waits for.
        step_ahead: when the engine's next boundary between two steps comes.
        next_token_within_s: for how long the answer to a commit waits for the next token.
    """

    def __init__(
        self,
        migration_id: str,
        *,
        port: MigrationEngine,
        call: Call,
        abort: Callable[[str], None],
        options: ReservationOptions,
        forget: Callable[[str], None],
        answer_after_s: Callable[[], float],
        step_ahead: Callable[[], StepAhead],
        next_token_within_s: float,
    ) -> None:
        super().__init__(machine, migration_id, call)
        self._port = port
        self._abort = abort
        self._forget = forget
        self._answer_after_s = answer_after_s
        self._step_ahead = step_ahead
        self._next_token_within_s = next_token_within_s
        self._reply: Reply | None = None
        self._reserve: ReserveBlocks | None = None
        self._final = b""
        self._refusal = ""
        self._block_ids: BlockTables = ()
        self._is_allocated = False
        self._room = asyncio.Event()
        # Tokens up to the end of the latest stage announced.
        self._num_stage_tokens = 0
        self._stage_places: set[Place] = set()
        self._blocks_begun: set[Place] = set()
        self._blocks_written: set[Place] = set()
        self.num_writing = 0
        # The engine's, of the request's next token: it has taken the request over.
        self._committed: Future[Future[None]] | None = None
        # When that token was there, by ``time.perf_counter()``.
        self._next_token_at_s: float | None = None
        self.begin(machine.absent(migration_id, options))

    @property
    def num_reserved_blocks(self) -> int:
        """Reserved blocks that are not the request's own yet."""
        if self._is_committed:
            return 0
        return sum(block_id != NO_BLOCK for table in self._block_ids for block_id in table)

    @property
    def _is_committed(self) -> bool:
        return (
            self._committed is not None
            and self._committed.done()
            and self._committed.exception() is None
        )

    # ---- messages -------------------------------------------------------------------------

    def take_in(self, message: ToDestination, reply: Reply) -> None:
        """A message of the source; answers go by ``reply`` from now on."""
        self._reply = reply
        match message:
            case ReserveBlocks():
                self._reserve = message
            case CommitRequest():
                self._final = message.final
        self.post(message)

    async def store(self, part: StoreBlocks, reply: Reply, write: Write) -> None:
        """Blocks of a stage have come; ``write`` puts them into the blocks of these ids."""
        self._announce(part, reply)
        if not self._is_receiving(part.stage):
            return
        await self._room.wait()
        record = self.record
        if not self._is_receiving(part.stage):
            return
        end = part.first_block + part.num_blocks
        table = self._block_ids[part.group] if part.group < len(self._block_ids) else []
        block_ids = table[part.first_block : end]
        if len(block_ids) != part.num_blocks or NO_BLOCK in block_ids:
            self._fail(f"blocks {part.first_block} to {end} of group {part.group} have no place")
            return
        places = [(part.group, place) for place in range(part.first_block, end)]
        if not self._stage_places.issuperset(places):
            self._fail(f"blocks {part.first_block} to {end} are not of this stage")
            return
        if not self._blocks_begun.isdisjoint(places):
            return  # doubled on the link; its slot may hold other blocks by now
        self._blocks_begun.update(places)
        self.num_writing += 1
        try:
            await write(block_ids)
        except RuntimeError as error:
            self._fail(str(error))
            return
        finally:
            self.num_writing -= 1
            self._cancel_unused()
        if not self._is_receiving(part.stage):
            return
        self._blocks_written.update(places)
        if len(self._blocks_written) == part.stage_num_sent:
            self.post(
                BlocksWritten(
                    migration_id=self.migration_id,
                    stage=part.stage,
                    num_blocks_total=record.first_block + record.num_stage_blocks,
                )
            )

    def cannot_write(self, part: StoreBlocks, reply: Reply, reason: str) -> None:
        """Blocks of a stage have come, but not their bytes: the migration ends, here and there."""
        self._announce(part, reply)
        if self._is_receiving(part.stage):
            self._fail(reason)

    def _fail(self, reason: str) -> None:
        self.post(AllocationFailed(migration_id=self.migration_id, reason=reason))

    def _announce(self, part: StoreBlocks, reply: Reply) -> None:
        """The first part of a stage announces it."""
        self._reply = reply
        stage = CopyBlocks(
            migration_id=self.migration_id,
            stage=part.stage,
            first_block=part.stage_first_block,
            num_blocks=part.stage_num_blocks,
        )
        if machine.is_current(self.record, stage):
            self._num_stage_tokens = part.stage_num_tokens
            self._stage_places = self._places_of(part)
            self._room.clear()
            self._blocks_begun = set()
            self._blocks_written = set()
        self.post(stage)

    def _places_of(self, part: StoreBlocks) -> set[Place]:
        end = part.stage_first_block + part.stage_num_blocks
        try:
            order = order_of(self._port.groups)
            return set(order.places(part.stage_first_block, end, part.stage_num_tokens))
        except IndexError:
            return set()  # a stage that cannot be: nothing of it is written

    def _is_receiving(self, stage: int) -> bool:
        return self.record.takes_blocks and self.record.stage == stage

    # ---- the table ------------------------------------------------------------------------

    def advanced(self) -> None:
        if not self.record.takes_blocks:
            self._room.set()  # whoever still waits to write finds that it may not
        if self.record.state is ReservationState.ABSENT:
            self.clear_timer()
            self._forget(self.migration_id)

    def execute(self, command: DestinationCommand) -> None:
        match command:
            case AllocateBlocks():
                self._spawn(self._allocate(command.request_id))
            case ReceiveBlocks():
                if self._num_stage_tokens <= self._num_tokens_held:
                    self._room.set()
                else:
                    self._spawn(self._grow(command.request_id, self._num_stage_tokens))
            case AdmitRequest():
                self._admit(command.request_id)
            case FreeBlocks():
                self._free()
            case AbortRequest():
                self._abort(command.request_id)
            case BlocksReserved() | BlocksCopied():
                step = self._step_ahead()
                self._answer(replace(command, step_ends_in_s=step.ends_in_s, step_s=step.step_s))
            case CommitAcknowledged():
                now_s = time.perf_counter()
                held_back_s = now_s - (self._next_token_at_s or now_s)
                self._answer(replace(command, held_back_s=held_back_s))
            case ReservationRejected():
                self._answer(replace(command, refusal=self._refusal))
            case ToSource():
                self._answer(command)
            case _:
                raise AssertionError(f"no such command: {command}")

    async def _allocate(self, request_id: str) -> None:
        try:
            reserve, self._reserve = self._reserve, None
            assert reserve is not None
            state = msgspec.msgpack.decode(reserve.state, type=RequestState)
            if reserve.groups != self._port.groups:
                raise CannotMigrate("the KV caches have other groups", Refusal.INCOMPATIBLE)
            reserved = await self._engine(lambda: self._port.reserve(state))
            self._is_allocated = True
            self._block_ids = reserved.block_ids
            if self.record.state is not ReservationState.ALLOCATING:
                self._free()  # given up while the engine was at it
                return
            if reserved.grammar is not None:
                async with asyncio.timeout(GRAMMAR_TIMEOUT_S):
                    await asyncio.wrap_future(reserved.grammar)
        except Exception as error:
            self._free()
            reason = str(error) or type(error).__name__
            if isinstance(error, CannotMigrate):
                self._refusal = error.refusal.value
            else:
                logger.warning("Reservation of migration %s failed: %r", self.migration_id, error)
            self._fail(reason)
            return
        self.post(
            BlocksAllocated(
                migration_id=self.migration_id, num_cached_blocks=reserved.num_cached_blocks
            )
        )

    def _free(self) -> None:
        """Give back what this migration, and no other of the same request, has reserved."""
        if self._is_allocated:
            self._is_allocated = False
            self._block_ids = ()
            self._cancel_unused()

    def _cancel_unused(self) -> None:
        """Blocks that were given up are free once no worker writes them any more."""
        if not self._is_allocated and not self.num_writing:
            request_id = self.record.request_id
            self._call(lambda: self._port.cancel(request_id))

    @property
    def _num_tokens_held(self) -> int:
        """Tokens that there are blocks for in every group."""
        held = [
            len(table) * group.block_size
            for group, table in zip(self._port.groups, self._block_ids, strict=True)
            if not group.is_live
        ]
        return min(held, default=1 << 62)

    async def _grow(self, request_id: str, num_tokens: int) -> None:
        try:
            block_ids = await self._engine(lambda: self._port.grow(request_id, num_tokens))
        except CannotMigrate as error:
            self._fail(str(error))
            return
        if self.record.takes_blocks:
            self._block_ids = block_ids
            self._room.set()

    def _admit(self, request_id: str) -> None:
        encoded = self._final

        def note(_: Future[None]) -> None:
            self._next_token_at_s = time.perf_counter()

        def commit() -> Future[None]:
            final = msgspec.msgpack.decode(encoded, type=FinalState)
            self._port.commit(request_id, final)
            # Without KV it waits for its turn, and nobody for an answer that tells when that came.
            num_tokens = len(final.output_token_ids) + (final.num_computed_tokens > 0)
            next_token = self._port.await_output(request_id, num_tokens)
            next_token.add_done_callback(note)
            return next_token

        self._committed = self._call(commit)
        self._spawn(self._admitted(self._committed))

    async def _admitted(self, committed: Future[Future[None]]) -> None:
        await asyncio.sleep(self._answer_after_s())
        try:
            next_token = await asyncio.wrap_future(committed)
        except Exception as error:
            logger.warning("Commit of migration %s failed: %r", self.migration_id, error)
            self.post(AdmissionFailed(migration_id=self.migration_id, reason=str(error)))
            return
        self._is_allocated = False  # the blocks are the request's own now
        self._block_ids = ()
        within_s = self._next_token_within_s
        await asyncio.wait([asyncio.wrap_future(next_token)], timeout=within_s)
        self.post(RequestAdmitted(migration_id=self.migration_id))

    def _answer(self, message: ToSource) -> None:
        async def send() -> None:
            assert self._reply is not None
            await self._reply(message)

        self._spawn(send())


class IncomingMigrations:
    """All migrations into one instance.

    Args:
        call: runs a closure on the engine's loop thread.
        abort: treats a request as aborted by its client.
        step_time_s: the engine's recent step time.
        step_ahead: when the engine's next boundary between two steps comes.
    """

    def __init__(
        self,
        *,
        port: MigrationEngine,
        call: Call,
        abort: Callable[[str], None],
        step_time_s: Callable[[], float],
        step_ahead: Callable[[], StepAhead],
        options: ReservationOptions,
        next_token_within_s: float = NEXT_TOKEN_WITHIN_S,
    ) -> None:
        self._port = port
        self._call = call
        self._abort = abort
        self._step_time_s = step_time_s
        self._step_ahead = step_ahead
        self._options = options
        self._next_token_within_s = next_token_within_s
        self._arriving: dict[str, IncomingMigration] = {}

    def __iter__(self) -> Iterator[IncomingMigration]:
        return iter(list(self._arriving.values()))

    @property
    def num_reserved(self) -> int:
        return sum(bool(arriving.num_reserved_blocks) for arriving in self)

    @property
    def num_reserved_blocks(self) -> int:
        return sum(arriving.num_reserved_blocks for arriving in self)

    def may_leave(self, request_id: str) -> bool:
        """True if a request that came here may move on: its source must know that it arrived."""
        return all(
            arriving.record.may_move_on or arriving.record.request_id != request_id
            for arriving in self
        )

    def answer_after_s(self) -> float:
        """How long to hold an answer back, for the step that begins with a commit to get through.

        It holds a slot and the source's blocks as well, so it is no longer than a step takes.
        """
        step_time_s = self._step_time_s()
        if not step_time_s:
            return MAX_ANSWER_AFTER_S
        return min(ANSWER_AFTER_STEPS * step_time_s, MAX_ANSWER_AFTER_S)

    def is_admitting(self, migration_id: str) -> bool:
        """True if the engine is taking the request over, and a client waits for its step."""
        arriving = self._arriving.get(migration_id)
        return arriving is not None and arriving.record.state is ReservationState.ADMITTING

    def take_in(self, message: ToDestination, reply: Reply) -> None:
        """A message of a source, other than blocks."""
        self._of(message.migration_id).take_in(message, reply)

    async def store(self, part: StoreBlocks, reply: Reply, write: Write) -> None:
        """Blocks of a stage have come; ``write`` puts them into the blocks of these ids."""
        await self._of(part.migration_id).store(part, reply, write)

    def cannot_write(self, part: StoreBlocks, reply: Reply, reason: str) -> None:
        """Blocks of a stage have come, but not their bytes."""
        self._of(part.migration_id).cannot_write(part, reply, reason)

    def peer_lost(self, source: str, reason: str, *, is_dead: bool) -> None:
        """A source cannot be reached, or its process is known to be dead."""
        for arriving in self:
            if arriving.record.source == source:
                arriving.post(
                    PeerLost(migration_id=arriving.migration_id, reason=reason, is_dead=is_dead)
                )

    def give_up(self, request_id: str) -> None:
        """The request goes on without what is arriving of it: its source was declared dead."""
        for arriving in self:
            if arriving.record.request_id == request_id:
                arriving.post(
                    PeerLost(
                        migration_id=arriving.migration_id,
                        reason="the request was resumed",
                        is_dead=True,
                    )
                )

    def _of(self, migration_id: str) -> IncomingMigration:
        arriving = self._arriving.get(migration_id)
        if arriving is None:
            arriving = self._arriving[migration_id] = IncomingMigration(
                migration_id,
                port=self._port,
                call=self._call,
                abort=self._abort,
                options=self._options,
                forget=self._forget,
                answer_after_s=self.answer_after_s,
                step_ahead=self._step_ahead,
                next_token_within_s=self._next_token_within_s,
            )
        return arriving

    def _forget(self, migration_id: str) -> None:
        self._arriving.pop(migration_id, None)
