"""One request on its way out: the source's executor of the migration table.

The table (``core.migration``) decides; this carries its commands out and turns what happens
into events, in one coroutine a migration. Long commands (copying a stage, waiting for a
suspension) run as tasks of their own, so an abort or a deadline is handled while they last;
events that come too late are dropped by ``is_current`` before they reach the table.

Invariant: when ``run`` returns, the engine holds nothing on the migration's behalf.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import msgspec

from llumsched.core.events import MigrationOutcome
from llumsched.core.migration.source import machine as protocol
from llumsched.engine.base import (
    CannotMigrate,
    MigrationEngine,
    Refusal,
    RequestState,
    SuspendedRequest,
)
from llumsched.migration.messages import (
    AbortMigrated,
    Commit,
    MigrationClosed,
    PeerMessage,
    QueryCommit,
    ReleaseReservation,
    Reserve,
)
from llumsched.wire.control import MigrationStatistics, ReportMigration

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ENDED = frozenset({protocol.MigrationState.COMMITTED, protocol.MigrationState.ABORTED})
# The destination may run the request: only its word, or its death, lets the source resume.
_FATE_UNKNOWN = frozenset({protocol.MigrationState.COMMITTING, protocol.MigrationState.RESOLVING})


class PeerLink(Protocol):
    """The connection to a destination."""

    @property
    def transport(self) -> str: ...

    async def send(self, message: PeerMessage) -> None: ...

    async def send_blocks(
        self,
        migration_id: str,
        stage: int,
        block_ids: list[int],
        first_block: int,
        *,
        is_final: bool,
    ) -> None:
        """Gather blocks and hand them over, chunk by chunk; returns when the last is sent."""


class OutgoingMigration:
    """Moves ``request_id`` to ``destination``; ``run`` returns how it went.

    Args:
        call: runs a closure on the engine's loop thread.
        link: an open connection to the destination.
    """

    def __init__(
        self,
        *,
        migration_id: str,
        request_id: str,
        source: str,
        destination: str,
        port: MigrationEngine,
        call: Callable[[Callable[[], Any]], Future[Any]],
        link: PeerLink,
        step_time_s: Callable[[], float],
        block_num_bytes: int,
        options: protocol.MigrationOptions,
    ) -> None:
        self.migration_id = migration_id
        self.request_id = request_id
        self.destination = destination
        self.refusal = ""  # the destination's word for it, when it rejects the reservation
        self._source = source
        self._port = port
        self._call = call
        self._link = link
        self._step_time_s = step_time_s
        self._block_num_bytes = block_num_bytes
        self._options = options
        self._events: asyncio.Queue[protocol.MigrationEvent] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._block_ids: list[int] = []
        self._num_preemptions = 0
        self._num_cached_blocks = 0
        self._num_blocks_sent = 0
        self._suspended: SuspendedRequest | None = None
        self._suspended_s = 0.0
        self._held_back_s = 0.0
        self._phase = "starting"

    # ---- events ---------------------------------------------------------------------------

    def post(self, event: protocol.MigrationEvent) -> None:
        """Take in an event; on the migrator's thread only."""
        self._events.put_nowait(event)

    def lost(self, what: str) -> None:
        """The engine's word that the request finished, was aborted or preempted."""
        kinds = {
            "finished": protocol.RequestFinished,
            "aborted": protocol.RequestAborted,
            "preempted": protocol.RequestPreempted,
        }
        self.post(kinds[what](migration_id=self.migration_id))

    def committed_before(self, held_back_s: float) -> None:
        """The destination had the request's next token so long before it said so."""
        self._held_back_s = held_back_s

    def reserved(self, num_cached_blocks: int) -> None:
        self._num_cached_blocks = num_cached_blocks

        async def read_progress() -> None:
            await self._pin_copyable()
            self.post(
                protocol.BlocksReserved(
                    migration_id=self.migration_id,
                    num_cached_blocks=num_cached_blocks,
                    num_full_blocks_now=len(self._block_ids),
                    num_preemptions=self._num_preemptions,
                )
            )

        self._spawn(read_progress())

    def stored(self, stage: int, num_blocks_total: int) -> None:
        """The destination has written a stage."""

        async def read_progress() -> None:
            if self._suspended is None:
                await self._pin_copyable()
            self.post(
                protocol.BlocksCopied(
                    migration_id=self.migration_id,
                    stage=stage,
                    num_blocks_total=num_blocks_total,
                    num_full_blocks_now=len(self._block_ids),
                    num_preemptions=self._num_preemptions,
                )
            )

        self._spawn(read_progress())

    async def _pin_copyable(self) -> None:
        blocks = await self._engine(lambda: self._port.pin_copyable(self.request_id))
        self._block_ids = blocks.block_ids
        self._num_preemptions = blocks.num_preemptions

    # ---- the loop -------------------------------------------------------------------------

    async def run(self) -> ReportMigration:
        """Move the request.

        Raises:
            CannotMigrate: if it cannot move; nothing has been done then.
        """
        started_s = time.perf_counter()
        state = await self._start_export()
        self._num_preemptions = state.num_preemptions
        self._state = state
        migration, commands = protocol.start(
            migration_id=self.migration_id,
            request_id=self.request_id,
            source=self._source,
            destination=self.destination,
            num_preemptions=state.num_preemptions,
            options=self._options,
        )
        self._migration = migration
        self._phase = migration.state.lower()
        try:
            await self._drive(commands)
        finally:
            for task in self._tasks:
                task.cancel()
            if self._migration.state not in _FATE_UNKNOWN:
                # Whatever else happened, nothing stays pinned or suspended.
                await self._engine(lambda: self._port.resume(self.request_id))
        migration = self._migration
        if migration.state is protocol.MigrationState.COMMITTED:
            total_s = time.perf_counter() - started_s
            return self._report(MigrationOutcome.COMMITTED, "", self._measured(migration, total_s))
        reason = migration.abort_reason
        detail = migration.abort_detail
        text = reason.value.replace("_", " ") if reason is not None else "aborted"
        refused = reason is protocol.AbortReason.RESERVATION_REJECTED
        return self._report(
            MigrationOutcome.REFUSED if refused else MigrationOutcome.ABORTED,
            detail if refused and detail else f"{text}: {detail}" if detail else text,
            cause=self.refusal or (reason.value if reason is not None else ""),
        )

    async def _start_export(self) -> RequestState:
        """Take the request; one that is computing its prompt has some time to get through it."""
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

    async def _drive(self, commands: tuple[protocol.MigrationCommand, ...]) -> None:
        deadline_s = self._deadline(self._migration)
        while True:
            for command in commands:
                await self._execute(self._migration, command)
            migration = self._migration
            if migration.is_terminal:
                return
            try:
                async with asyncio.timeout(max(0.0, deadline_s - time.monotonic())):
                    event = await self._events.get()
            except TimeoutError:
                event = protocol.DeadlineExpired(
                    migration_id=self.migration_id, state=migration.state, stage=migration.stage
                )
            commands = ()
            if not protocol.is_current(migration, event):
                continue
            try:
                self._migration, commands = protocol.advance(migration, event)
                if self._migration.state not in _ENDED:
                    self._phase = self._migration.state.lower()
            except protocol.IllegalTransition as error:
                # A peer that breaks the protocol, or a defect here: the table has changed nothing,
                # and the deadline of the state it left in place ends the migration in order.
                logger.error("Migration %s: %s", self.migration_id, error)
                continue
            if protocol.restarts_timer(migration, event, self._migration):
                deadline_s = self._deadline(self._migration)

    @staticmethod
    def _deadline(migration: protocol.Migration) -> float:
        timeout_s = protocol.timeout_s(migration)
        return time.monotonic() + (timeout_s if timeout_s is not None else 0.0)

    # ---- commands -------------------------------------------------------------------------

    async def _execute(
        self, migration: protocol.Migration, command: protocol.MigrationCommand
    ) -> None:
        match command:
            case protocol.ReserveBlocks():
                await self._link.send(
                    Reserve(
                        migration_id=self.migration_id,
                        request_id=self.request_id,
                        source=self._source,
                        state=msgspec.msgpack.encode(self._state),
                    )
                )
            case protocol.CopyBlocks():
                self._spawn(self._copy(command))
            case protocol.SuspendRequest():
                self._spawn(self._suspend(command.num_blocks_copied))
            case protocol.CommitRequest():
                assert self._suspended is not None
                await self._link.send(
                    Commit(
                        migration_id=self.migration_id,
                        num_blocks=command.num_blocks,
                        final=msgspec.msgpack.encode(self._suspended.final),
                    )
                )
            case protocol.QueryCommit():
                await self._link.send(QueryCommit(migration_id=self.migration_id))
            case protocol.ReleaseBlocks(side=protocol.Side.SOURCE):
                if self._suspended is not None:
                    resumed_at_s = time.perf_counter() - self._held_back_s
                    self._suspended_s = resumed_at_s - self._suspended.suspended_at_s
                await self._engine(lambda: self._port.release(self.request_id))
            case protocol.ReleaseBlocks():
                await self._link.send(
                    ReleaseReservation(
                        migration_id=self.migration_id,
                        reason=str(migration.abort_reason or ""),
                    )
                )
            case protocol.ResumeRequest():
                await self._engine(lambda: self._port.resume(self.request_id))
            case protocol.AbortAtDestination():
                await self._link.send(
                    AbortMigrated(migration_id=self.migration_id, request_id=self.request_id)
                )
            case protocol.CloseMigration():
                await self._link.send(MigrationClosed(migration_id=self.migration_id))
            case _:
                raise AssertionError(f"no such command: {command}")

    async def _copy(self, command: protocol.CopyBlocks) -> None:
        last = command.first_block + command.num_blocks
        self._num_blocks_sent += command.num_blocks
        await self._link.send_blocks(
            self.migration_id,
            command.stage,
            self._block_ids[command.first_block : last],
            command.first_block,
            is_final=command.final,
        )

    async def _suspend(self, num_blocks_copied: int) -> None:
        try:
            suspension = await self._engine(lambda: self._port.suspend(self.request_id))
            suspended = await asyncio.wrap_future(suspension)
        except CannotMigrate as error:
            # The engine says why by itself (``lost``), or the deadline of this state does.
            logger.info("Migration %s: %s", self.migration_id, error)
            return
        self._suspended = suspended
        self._block_ids = suspended.blocks.block_ids
        self._num_preemptions = suspended.blocks.num_preemptions
        self.post(
            protocol.RequestSuspended(
                migration_id=self.migration_id,
                num_blocks_to_copy=max(0, len(self._block_ids) - num_blocks_copied),
                num_preemptions=self._num_preemptions,
            )
        )

    # ---- helpers --------------------------------------------------------------------------

    async def _engine(self, function: Callable[[], T]) -> T:
        result: T = await asyncio.wrap_future(self._call(function))
        return result

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            try:
                await coroutine
            except asyncio.CancelledError:
                raise
            except Exception as error:
                logger.exception("Migration %s failed", self.migration_id)
                self.post(
                    protocol.PeerLost(migration_id=self.migration_id, reason=f"failed: {error}")
                )

        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _measured(self, migration: protocol.Migration, total_s: float) -> MigrationStatistics:
        assert self._suspended is not None
        final = self._suspended.final
        return MigrationStatistics(
            num_stages=migration.stage,
            num_blocks=self._num_blocks_sent,
            num_cached_blocks=self._num_cached_blocks,
            num_bytes=self._num_blocks_sent * self._block_num_bytes,
            num_tokens=final.num_computed_tokens + 1,
            num_output_tokens=len(final.output_token_ids),
            total_s=total_s,
            suspended_s=self._suspended_s,
            step_time_s=self._step_time_s(),
            transport=self._link.transport,
        )

    def _report(
        self,
        outcome: MigrationOutcome,
        reason: str,
        statistics: MigrationStatistics | None = None,
        cause: str = "",
    ) -> ReportMigration:
        return ReportMigration(
            migration_id=self.migration_id,
            request_id=self.request_id,
            source=self._source,
            destination=self.destination,
            outcome=outcome.value,
            reason=reason,
            cause=cause,
            phase=self._phase,
            statistics=statistics,
        )
