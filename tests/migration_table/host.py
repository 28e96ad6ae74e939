"""One instance of the model: a fake engine under what ships of a migrator, but for its sockets.

`OutgoingMigrations` and `IncomingMigrations` run as they do in an instance's process, on a loop
whose callbacks, timers and time belong to the test. Work for the engine goes through a queue (the
engine's thread) and copying through another (its workers), so anything can happen in between.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from llumsched.core.migration.destination.events import ReservationState
from llumsched.core.migration.destination.record import Reservation, ReservationOptions
from llumsched.core.migration.events import DeadlineExpired
from llumsched.core.migration.messages import (
    CopyBlocks,
    MigrationMessage,
    ToDestination,
    ToSource,
)
from llumsched.core.migration.source.record import Migration, MigrationOptions
from llumsched.engine.base import CannotMigrate, FinalState, StepAhead
from llumsched.migration.destination import IncomingMigrations
from llumsched.migration.messages import StoreBlocks
from llumsched.migration.runs import Run
from llumsched.migration.source import OutgoingMigrations
from llumsched.wire.control import ReportMigration
from tests.fake_engine.blocks import BlockContent
from tests.fake_engine.engine import FakeEngine
from tests.virtual_loop import Callback, VirtualLoop

BLOCKS_PER_PART = 2
UNKNOWN_STEP = StepAhead()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sent:
    """A message on its way, and the content of blocks that travels with it."""

    sender: str
    receiver: str
    message: MigrationMessage | StoreBlocks
    content: list[BlockContent] = field(default_factory=list)


class Network(Protocol):
    def send(self, sent: Sent) -> None: ...

    def notice(self, request_id: str, instance_id: str, order: tuple[int, int]) -> None:
        """Tell the frontend which instance has the request; the highest order is the latest."""

    def allow_repeats(self, request_id: str) -> None:
        """The frontend drops, by position, tokens of the request that it has already."""

    def admission_fails(self) -> bool: ...


class Instance:
    """The world runs `engine_work`, `copies` and the callbacks and timers of `loop`, one by one."""

    def __init__(
        self,
        instance_id: str,
        engine: FakeEngine,
        network: Network,
        options: MigrationOptions,
        step_ahead: StepAhead = UNKNOWN_STEP,
    ) -> None:
        self.instance_id = instance_id
        self.engine = engine
        self.step_ahead = step_ahead
        self.alive = True
        self.known_dead: set[str] = set()
        self.engine_work: deque[Callable[[], None]] = deque()
        self.copies: deque[Callable[[], None]] = deque()
        self.loop = VirtualLoop()
        self.reports: dict[str, ReportMigration | None] = {}
        self._network = network
        self._resume, self._commit = engine.resume, engine.commit
        observed: Any = engine
        observed.resume, observed.commit = self._observe_resume, self._observe_commit
        with self.loop.running():
            self.outgoing = OutgoingMigrations(
                instance_id=instance_id,
                port=engine,
                call=self._call,
                step_time_s=lambda: 0.0,
                block_num_bytes=[1] * len(engine.groups),
                options=options,
            )
            self.incoming = IncomingMigrations(
                port=engine,
                call=self._call,
                abort=self.abort,
                step_time_s=lambda: 0.0,
                step_ahead=lambda: self.step_ahead,
                options=ReservationOptions(),
            )

    # ---- what the world does to it ----------------------------------------------------------

    def start_migration(
        self, migration_id: str, request_id: str, to: str, *, has_ended: bool = False
    ) -> bool:
        """Begin to move a request, or what is cached of one, if the migrator would."""
        if to in self.known_dead or any(o.request_id == request_id for o in self.outgoing):
            return False
        if not self.incoming.may_leave(request_id):
            return False
        self.loop.create_task(self._migrate(migration_id, request_id, to, has_ended))
        return True

    async def _migrate(self, migration_id: str, request_id: str, to: str, has_ended: bool) -> None:
        self.reports[migration_id] = None
        with contextlib.suppress(CannotMigrate):
            self.reports[migration_id] = await self.outgoing.run(
                migration_id, request_id, to, _Link(self, to), has_ended=has_ended
            )

    def receive(self, sent: Sent) -> None:
        """A message has come, for either side."""
        message = sent.message

        async def reply(answer: ToSource) -> None:
            self.send(Sent(sender=self.instance_id, receiver=sent.sender, message=answer))

        match message:
            case StoreBlocks():
                self.loop.create_task(
                    self.incoming.store(message, reply, lambda ids: self._write(ids, sent.content))
                )
            case ToDestination():
                self.loop.call_soon(self.incoming.take_in, message, reply)
            case ToSource():
                self.loop.call_soon(self._answered, message, sent.sender)

    def _answered(self, message: ToSource, sender: str) -> None:
        answer = self.outgoing.take_in(message)
        if answer is not None:
            self.send(Sent(sender=self.instance_id, receiver=sender, message=answer))

    def abort(self, request_id: str) -> None:
        """A client's abort has come here."""
        self.engine_work.append(lambda: self.engine.abort(request_id))

    def peer_lost(self, peer: str, is_dead: bool) -> None:
        if is_dead:
            self.known_dead.add(peer)
        reason = f"instance {peer} is lost"
        self.loop.call_soon(lambda: self.outgoing.peer_lost(peer, reason, is_dead=is_dead))
        self.loop.call_soon(lambda: self.incoming.peer_lost(peer, reason, is_dead=is_dead))

    def die(self) -> None:
        """Nothing of it runs any more, and nothing that it was about to say is sent."""
        self.alive = False
        self.engine_work.clear()
        self.copies.clear()
        self.loop.end_tasks()

    # ---- what it waits for ------------------------------------------------------------------

    def deadlines(self) -> list[Callback]:
        """Timers of the protocol, but for tombstones."""
        return [t for t in self.loop.timers() if (e := _expiry(t)) and not _is_tombstone(e)]

    def tombstones(self) -> list[tuple[str, Callback]]:
        """Timers of tombstones, with the migration of each."""
        timers = self.loop.timers()
        return [(e.migration_id, t) for t in timers if (e := _expiry(t)) and _is_tombstone(e)]

    def sleeps(self) -> list[Callback]:
        """Timers that end by themselves."""
        return [timer for timer in self.loop.timers() if _expiry(timer) is None]

    def migrations(self) -> list[Migration]:
        """Records of the migrations that leave."""
        return [outgoing.record for outgoing in self.outgoing if outgoing.has_begun]

    def reservations(self) -> dict[str, Reservation]:
        """Records of the migrations that arrive, or have arrived a while ago."""
        return {arriving.migration_id: arriving.record for arriving in self.incoming}

    # ---- what it stands on ------------------------------------------------------------------

    def send(self, sent: Sent) -> None:
        if self.alive:
            self._network.send(sent)

    def _call(self, function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function()
            except CannotMigrate as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        if self.alive:
            self.engine_work.append(run)
        else:
            future.cancel()
        return future

    async def copy(self, function: Callable[[], None]) -> None:
        """Have a worker copy, when the world lets it."""
        done = self.loop.create_future()

        def run() -> None:
            if not done.cancelled():
                function()
                done.set_result(None)

        self.copies.append(run)
        await done

    async def _write(self, block_ids: list[int], content: list[BlockContent]) -> None:
        await self.copy(lambda: self.engine.blocks.scatter(block_ids, content))

    def _observe_resume(self, request_id: str) -> None:
        was_exporting = self.engine.is_exporting(request_id)
        self._resume(request_id)
        request = self.engine.requests.get(request_id)
        if request is None or not was_exporting:
            return
        for migration in self.migrations():
            if migration.request_id == request_id and migration.destination_is_dead:
                # The destination may have announced this move: it counts, and this outdoes it.
                request.placement_number += 1
                self._network.allow_repeats(request_id)
                order = (request.placement_number, 1)
                self._network.notice(request_id, self.instance_id, order)

    def _observe_commit(self, request_id: str, final: FinalState) -> None:
        if self._network.admission_fails():
            self.engine.cancel(request_id)
            raise CannotMigrate("injected")
        self._commit(request_id, final)
        request = self.engine.requests.get(request_id)
        if request is None:
            return  # it has ended, and its blocks are cached
        order = (request.placement_number, 0)
        self._network.notice(request_id, self.instance_id, order)


def _expiry(timer: Callback) -> DeadlineExpired | None:
    return next((event for event in timer.args if isinstance(event, DeadlineExpired)), None)


def _is_tombstone(event: DeadlineExpired) -> bool:
    return event.state is ReservationState.RELEASED


class _Link:
    """The way from an instance to a destination, part by part."""

    transport = "the model's"

    def __init__(self, source: Instance, destination: str) -> None:
        self._source = source
        self._destination = destination

    async def send(self, message: ToDestination) -> None:
        self._send(message, [])

    async def send_blocks(self, stage: CopyBlocks, num_tokens: int, runs: Sequence[Run]) -> None:
        parts = [
            (run.group, run.first + start, run.block_ids[start : start + BLOCKS_PER_PART])
            for run in runs
            for start in range(0, len(run.block_ids), BLOCKS_PER_PART)
        ]
        for group, first, ids in parts or [(0, 0, [])]:
            content: list[BlockContent] = []
            await self._source.copy(partial(self._source.engine.blocks.gather, ids, content))
            part = StoreBlocks(
                migration_id=stage.migration_id,
                stage=stage.stage,
                stage_first_block=stage.first_block,
                stage_num_blocks=stage.num_blocks,
                stage_num_sent=sum(len(run.block_ids) for run in runs),
                stage_num_tokens=num_tokens,
                group=group,
                first_block=first,
                num_blocks=len(ids),
                slot=0,
                use=0,
            )
            self._send(part, content)

    def _send(self, message: ToDestination | StoreBlocks, content: list[BlockContent]) -> None:
        self._source.send(
            Sent(
                sender=self._source.instance_id,
                receiver=self._destination,
                message=message,
                content=content,
            )
        )
