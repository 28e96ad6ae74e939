"""Requests on their way out: the source's host of the migration protocol.

The table (``core.migration.source``) decides; this carries its commands out, in their order, and
turns what happens into events, in one coroutine a migration. Long commands (copying a stage,
waiting for a suspension) run as tasks of their own, so an abort or a deadline is handled while they
last; events that come too late are dropped before they reach the table.

Invariant: when ``run`` returns, the engine holds nothing on the migration's behalf, unless the
destination may run the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol

import msgspec

from llumsched.core.events import MigrationOutcome
from llumsched.core.migration.events import LocalEvent, PeerLost
from llumsched.core.migration.groups import order_of
from llumsched.core.migration.messages import (
    BlocksCopied,
    BlocksReserved,
    CloseMigration,
    CommitAcknowledged,
    CommitRequest,
    CopyBlocks,
    ReservationRejected,
    ReserveBlocks,
    ToDestination,
    ToSource,
)
from llumsched.core.migration.source import machine
from llumsched.core.migration.source.events import (
    AbortedAtSource,
    FinishedAtSource,
    MigrationState,
    PreemptedAtSource,
    ReleaseRequest,
    RequestSuspended,
    ResumeRequest,
    SourceCommand,
    SourceEvent,
    SuspendRequest,
)
from llumsched.core.migration.source.record import (
    AbortReason,
    Migration,
    MigrationOptions,
    hand_over_s,
)
from llumsched.engine.base import (
    CannotMigrate,
    CopyableBlocks,
    MigrationEngine,
    Refusal,
    RequestState,
    SuspendedRequest,
)
from llumsched.migration.host import Call, MigrationHost
from llumsched.migration.reports import report_of
from llumsched.migration.runs import Run, runs_of
from llumsched.wire.control import MigrationStatistics, ReportMigration, StageStatistics

logger = logging.getLogger(__name__)

# The destination may run the request: only its word, or its death, lets the source resume.
_FATE_UNKNOWN = frozenset({MigrationState.COMMITTING, MigrationState.RESOLVING})

_LOSSES: dict[str, type[LocalEvent]] = {
    "finished": FinishedAtSource,
    "aborted": AbortedAtSource,
    "preempted": PreemptedAtSource,
}


class PeerLink(Protocol):
    """The connection to a destination."""

    @property
    def transport(self) -> str: ...

    async def send(self, message: ToDestination) -> None: ...

    async def send_blocks(self, stage: CopyBlocks, num_tokens: int, runs: Sequence[Run]) -> None:
        """Gather a stage's blocks and hand them over, part by part; returns when the last is sent.

        ``num_tokens`` tokens of the request are in the blocks up to the stage's last.
        """


class OutgoingMigration(MigrationHost[Migration, SourceEvent, SourceCommand]):
    """Moves ``request_id`` to ``destination``; ``run`` returns what became of it.

    Args:
        call: runs a closure on the engine's loop thread.
        link: an open connection to the destination.
        step_time_s: the engine's recent step time.
        has_ended: the request has, and its cached blocks move.
    """

    def __init__(
        self,
        *,
        migration_id: str,
        request_id: str,
        source: str,
        destination: str,
        port: MigrationEngine,
        call: Call,
        link: PeerLink,
        step_time_s: Callable[[], float],
        options: MigrationOptions,
        has_ended: bool = False,
    ) -> None:
        super().__init__(machine, migration_id, call)
        self.has_ended = has_ended
        self.request_id = request_id
        self.destination = destination
        self._source = source
        self._port = port
        self._link = link
        self._step_time_s = step_time_s
        self._options = options
        self._state: RequestState | None = None
        self._commands: asyncio.Queue[SourceCommand | None] = asyncio.Queue()
        self._order = order_of(port.groups)
        self._blocks = CopyableBlocks(
            block_ids=tuple([] for _ in port.groups), num_tokens=0, num_preemptions=0
        )
        self._num_cached_blocks = 0
        # Of each group.
        self._num_blocks_sent = [0] * len(port.groups)
        self._suspended: SuspendedRequest | None = None
        self._suspended_s = 0.0
        self._held_back_s = 0.0
        self._begun_s = time.perf_counter()
        self._stages: list[StageStatistics] = []
        # How far it came, and the destination's word for a rejection.
        self.phase = "starting"
        self.refusal = ""

    # ---- events ---------------------------------------------------------------------------

    def take_in(self, message: ToSource) -> None:
        """A message of the destination."""
        if not self.has_begun or self.record.is_terminal:
            return
        match message:
            case BlocksReserved():
                self._num_cached_blocks = message.num_cached_blocks
                self._fill_in(message)
            case BlocksCopied():
                self._stage_arrived()
                self._fill_in(message)
            case ReservationRejected():
                self.refusal = message.refusal
                self.post(message)
            case CommitAcknowledged():
                self._held_back_s = message.held_back_s
                self._stage_arrived()
                self.post(message)
            case _:
                self.post(message)

    def lost(self, what: str) -> None:
        """The engine's word that the request finished, was aborted or preempted."""
        self.post(_LOSSES[what](migration_id=self.migration_id))

    def advanced(self) -> None:
        if self.record.is_terminal:
            self._commands.put_nowait(None)  # there may be no other
        else:
            self.phase = self.record.state.lower()

    def _fill_in(self, message: BlocksReserved | BlocksCopied) -> None:
        """Add what the source itself knows, as it is now."""
        if self._suspended is None:
            # Called here and now: the end of the export may be the next call.
            pinned = self._call(lambda: self._port.pin_copyable(self.request_id))
            self._spawn(self._pinned(message, pinned))
        else:
            self._post_filled_in(message)

    async def _pinned(
        self, message: BlocksReserved | BlocksCopied, pinned: Future[CopyableBlocks]
    ) -> None:
        blocks = await asyncio.wrap_future(pinned)
        if self._suspended is None:
            self._blocks = blocks
        self._post_filled_in(message)

    def _post_filled_in(self, message: BlocksReserved | BlocksCopied) -> None:
        assert self._state is not None
        self.post(
            replace(
                message,
                # Without KV it is in no batch already: to wait would only prolong that. Of one that
                # has ended nothing stands still.
                step_s=message.step_s if self._state.has_kv and not self.has_ended else 0.0,
                num_full_blocks_now=self._num_blocks_now,
                num_preemptions=self._blocks.num_preemptions,
                hand_over_s=hand_over_s(self._step_time_s()),
            )
        )

    @property
    def _num_blocks_now(self) -> int:
        """Blocks that may be copied: once the request is suspended, all of them."""
        count = self._order.num_settled if self._suspended is None else self._order.num_blocks
        return count(self._blocks.num_tokens)

    # ---- commands -------------------------------------------------------------------------

    async def run(self) -> Migration:
        """Move the request; returns the record at its end.

        Raises:
            CannotMigrate: if it cannot move; nothing has been done then.
        """
        self._state = state = await self._start_export()
        self._blocks = replace(self._blocks, num_preemptions=state.num_preemptions)
        try:
            migration, commands = machine.start(
                migration_id=self.migration_id,
                request_id=self.request_id,
                source=self._source,
                destination=self.destination,
                num_preemptions=state.num_preemptions,
                groups=self._port.groups,
                options=self._options,
            )
            self.phase = migration.state.lower()
            self.begin(migration, commands)
            while not self.record.is_terminal or not self._commands.empty():
                command = await self._commands.get()
                if command is not None:
                    await self._carry_out(command)
        finally:
            self.stop()
            if self.record.state not in _FATE_UNKNOWN:
                # Whatever else happened, nothing stays pinned or suspended.
                await self._engine(lambda: self._port.resume(self.request_id))
        return self.record

    async def _start_export(self) -> RequestState:
        """Take the request; one that is computing its prompt has some time to get through it."""
        if self.has_ended:
            return await self._start_prefix_export()
        deadline_s = time.monotonic() + self._options.prefill_timeout_s
        while True:
            try:
                return await self._engine(lambda: self._port.start_export(self.request_id))
            except CannotMigrate as error:
                left_s = deadline_s - time.monotonic()
                if error.refusal is not Refusal.PREFILLING or left_s <= 0:
                    raise
            first_token = await self._engine(lambda: self._port.await_output(self.request_id, 1))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await asyncio.wrap_future(first_token)

    async def _start_prefix_export(self) -> RequestState:
        request_id = self.request_id
        pinned = await self._engine(lambda: self._port.start_prefix_export(request_id))
        try:
            async with asyncio.timeout(self._options.suspend_timeout_s):
                return await asyncio.wrap_future(pinned)
        except TimeoutError:
            await self._engine(lambda: self._port.resume(request_id))
            raise CannotMigrate("steps in flight take too long") from None

    def execute(self, command: SourceCommand) -> None:
        self._commands.put_nowait(command)

    async def _carry_out(self, command: SourceCommand) -> None:
        match command:
            case ReserveBlocks():
                state = msgspec.msgpack.encode(self._state)
                await self._link.send(replace(command, state=state))
            case CopyBlocks():
                self._spawn(self._copy(command))
            case CommitRequest():
                assert self._suspended is not None
                final = msgspec.msgpack.encode(self._suspended.final)
                await self._link.send(replace(command, final=final))
            case ToDestination():
                await self._link.send(command)
            case SuspendRequest():
                if command.after_s > 0:
                    self._spawn(self._suspend_later(command))
                else:
                    self._spawn(self._suspend(self._call_suspend(), command.num_blocks_copied))
            case ReleaseRequest():
                if self._suspended is not None:
                    resumed_at_s = time.perf_counter() - self._held_back_s
                    self._suspended_s = resumed_at_s - self._suspended.suspended_at_s
                await self._engine(lambda: self._port.release(self.request_id))
            case ResumeRequest():
                await self._engine(lambda: self._port.resume(self.request_id))
            case _:
                raise AssertionError(f"no such command: {command}")

    async def _copy(self, command: CopyBlocks) -> None:
        blocks = self._blocks
        runs = runs_of(self._order, command, blocks.block_ids, blocks.num_tokens)
        for run in runs:
            self._num_blocks_sent[run.group] += len(run.block_ids)
        num_blocks = sum(len(run.block_ids) for run in runs)
        began_s = time.perf_counter() - self._begun_s
        self._stages.append(StageStatistics(num_blocks=num_blocks, began_s=began_s, took_s=0.0))
        await self._link.send_blocks(command, blocks.num_tokens, runs)

    async def _suspend_later(self, command: SuspendRequest) -> None:
        """The request decodes on until a step of the destination is about to end."""
        await asyncio.sleep(command.after_s)
        if self.record.state is MigrationState.SUSPENDING:
            await self._suspend(self._call_suspend(), command.num_blocks_copied)

    def _call_suspend(self) -> Future[Future[SuspendedRequest]]:
        # Called here and now: the end of the export may be the next call.
        return self._call(lambda: self._port.suspend(self.request_id))

    def _stage_arrived(self) -> None:
        if self._stages and not self._stages[-1].took_s:
            stage = self._stages[-1]
            took_s = time.perf_counter() - self._begun_s - stage.began_s
            self._stages[-1] = msgspec.structs.replace(stage, took_s=took_s)

    async def _suspend(
        self, called: Future[Future[SuspendedRequest]], num_blocks_copied: int
    ) -> None:
        try:
            suspension: Future[SuspendedRequest] = await asyncio.wrap_future(called)
            suspended = await asyncio.wrap_future(suspension)
        except CannotMigrate as error:
            # The engine says why by itself (``lost``), or the deadline of this state does.
            logger.info("Migration %s: %s", self.migration_id, error)
            return
        self._suspended = suspended
        self._blocks = suspended.blocks
        self.post(
            RequestSuspended(
                migration_id=self.migration_id,
                num_blocks_to_copy=max(0, self._num_blocks_now - num_blocks_copied),
                num_preemptions=self._blocks.num_preemptions,
            )
        )

    def failed(self, error: BaseException) -> None:
        self.post(PeerLost(migration_id=self.migration_id, reason=f"failed: {error}"))

    # ---- afterwards -----------------------------------------------------------------------

    def statistics(
        self, *, total_s: float, step_time_s: float, block_num_bytes: Sequence[int]
    ) -> MigrationStatistics:
        """Of a migration that was committed."""
        assert self._suspended is not None
        final = self._suspended.final
        return MigrationStatistics(
            num_stages=self.record.stage,
            num_blocks=sum(self._num_blocks_sent),
            num_cached_blocks=self._num_cached_blocks,
            num_bytes=sum(
                num * size for num, size in zip(self._num_blocks_sent, block_num_bytes, strict=True)
            ),
            num_tokens=final.num_computed_tokens + (not self.has_ended),
            num_output_tokens=len(final.output_token_ids),
            total_s=total_s,
            suspended_s=self._suspended_s,
            step_time_s=step_time_s,
            transport=self._link.transport,
            stages=tuple(self._stages),
        )


class OutgoingMigrations:
    """All migrations out of one instance. Every method runs on the loop.

    Args:
        call: runs a closure on the engine's loop thread.
        step_time_s: the engine's recent step time.
        block_num_bytes: of a block of each group on its way, for the statistics.
    """

    def __init__(
        self,
        *,
        instance_id: str,
        port: MigrationEngine,
        call: Call,
        step_time_s: Callable[[], float],
        block_num_bytes: Sequence[int],
        options: MigrationOptions,
    ) -> None:
        self._instance_id = instance_id
        self._port = port
        self._call = call
        self._step_time_s = step_time_s
        self._block_num_bytes = block_num_bytes
        self._options = options
        self._open: dict[str, OutgoingMigration] = {}
        self._loop = asyncio.get_running_loop()
        port.on_lost = self._on_lost

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[OutgoingMigration]:
        return iter(list(self._open.values()))

    async def run(
        self,
        migration_id: str,
        request_id: str,
        destination: str,
        link: PeerLink,
        *,
        has_ended: bool = False,
    ) -> ReportMigration:
        """Move a request, or what is cached of one that has ended, or try to; how it went.

        Raises:
            CannotMigrate: if it cannot move; nothing has been done then.
        """
        started_s = time.perf_counter()
        outgoing = self._open[migration_id] = OutgoingMigration(
            migration_id=migration_id,
            request_id=request_id,
            source=self._instance_id,
            destination=destination,
            port=self._port,
            call=self._call,
            link=link,
            step_time_s=self._step_time_s,
            options=self._options,
            has_ended=has_ended,
        )
        try:
            migration = await outgoing.run()
        finally:
            del self._open[migration_id]
        if migration.state is MigrationState.COMMITTED:
            statistics = outgoing.statistics(
                total_s=time.perf_counter() - started_s,
                step_time_s=self._step_time_s(),
                block_num_bytes=self._block_num_bytes,
            )
            return report_of(outgoing, MigrationOutcome.COMMITTED, statistics=statistics)
        reason, detail = migration.abort_reason, migration.abort_detail
        text = reason.value.replace("_", " ") if reason is not None else "aborted"
        refused = reason is AbortReason.RESERVATION_REJECTED
        return report_of(
            outgoing,
            MigrationOutcome.REFUSED if refused else MigrationOutcome.ABORTED,
            detail if refused and detail else f"{text}: {detail}" if detail else text,
            cause=outgoing.refusal or (reason.value if reason is not None else ""),
        )

    def take_in(self, message: ToSource) -> ToDestination | None:
        """A message of a destination; the answer, if the migration it is of is forgotten."""
        outgoing = self._open.get(message.migration_id)
        if outgoing is not None:
            outgoing.take_in(message)
        elif isinstance(message, CommitAcknowledged):
            # The destination asks until it knows that its answer has come.
            return CloseMigration(migration_id=message.migration_id)
        return None

    def peer_lost(self, instance_id: str, reason: str, *, is_dead: bool) -> None:
        """A destination cannot be reached, or its process is known to be dead."""
        for outgoing in self:
            if outgoing.destination == instance_id:
                outgoing.post(
                    PeerLost(migration_id=outgoing.migration_id, reason=reason, is_dead=is_dead)
                )

    def _on_lost(self, request_id: str, what: str) -> None:
        """Called on the engine's loop thread."""

        def tell() -> None:
            for outgoing in self:
                if outgoing.request_id == request_id:
                    outgoing.lost(what)

        self._loop.call_soon_threadsafe(tell)
