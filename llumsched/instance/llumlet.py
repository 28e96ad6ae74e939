"""The llumlet: an instance's own scheduler-facing half.

It pushes load reports several times a second while something is here, and at once after a large
change (``report_pace``); it takes
migration orders, picks the request that moves where the order leaves that open (only the
source has fresh per-request state), and reports how each migration ended. It runs on the
migrator's loop and touches the engine only through closures on the engine's loop thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from llumsched.core.events import Event
from llumsched.core.load import InstanceLoad
from llumsched.core.migration.source.record import MigrationOptions
from llumsched.core.policy import MigrationCandidate, VictimPolicy, settled
from llumsched.core.transfer_options import TransferOptions
from llumsched.engine.base import InstanceEngine
from llumsched.instance.report_pace import IDLE_REPORT_INTERVAL_S, ReportPace
from llumsched.logs import FailureLog
from llumsched.migration.migrator import Migrator
from llumsched.wire.control import (
    InstanceGone,
    InstanceLeaves,
    OrderMigration,
    RegisterInstance,
    ReportLoad,
    ReportPrefixBlocks,
    Unknown,
    decode_control,
    encode,
)
from llumsched.wire.keys import PoolKeys

logger = logging.getLogger(__name__)
_failures = FailureLog(logger)

T = TypeVar("T")

# Reports on large changes come no closer than this.
MIN_REPORT_INTERVAL_S = 0.02
# Which request would move next takes a look at every running one, between two steps.
VICTIM_INTERVAL_S = 0.5


def choose_victims(
    victim: VictimPolicy, candidates: Sequence[MigrationCandidate]
) -> Sequence[MigrationCandidate]:
    """The policy's choice, best first; the candidates as they are if it raises, and without
    what it made up."""
    try:
        known = {candidate.request_id for candidate in candidates}
        return [chosen for chosen in victim.choose(candidates) if chosen.request_id in known]
    except Exception:
        name = type(victim).__name__
        _failures.failed(name, "Policy %s failed; any request may move", name)
        return candidates


class Llumlet:
    """Args:
    engine: the instance's, which does not run yet.
    victim: orders the candidates when the source has to pick.
    scheduler_endpoint: the global scheduler's control socket.
    keys: the pool's.
    host: address to bind the migrator to.
    launch_id: the scheduler's order that this instance answers, if any.
    idle_report_interval_s: between two reports of an idle instance.
    """

    def __init__(
        self,
        *,
        engine: InstanceEngine,
        instance_id: str,
        victim: VictimPolicy,
        scheduler_endpoint: str,
        keys: PoolKeys,
        host: str,
        options: MigrationOptions,
        transfer: TransferOptions,
        launch_id: str | None = None,
        idle_report_interval_s: float = IDLE_REPORT_INTERVAL_S,
    ) -> None:
        self._engine = engine
        self._launch_id = launch_id
        self._instance_id = instance_id
        self._victim = victim
        self._prefix_blocks = engine.prefix_blocks
        self._port = engine.migration
        self._loop = asyncio.get_running_loop()
        self._report_now = asyncio.Event()
        self._pace = ReportPace(idle_report_interval_s)
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        keys.connect_with(self._socket)
        self._socket.connect(scheduler_endpoint)
        self._migrator = Migrator(
            instance_id=instance_id,
            port=engine.migration,
            call=engine.call,
            abort=lambda request_id: self._abort(request_id),
            keys=keys,
            host=host,
            step_time_s=lambda: engine.step_time_s,
            step_ahead=engine.step_ahead,
            options=options,
            transfer=transfer,
            spoken_to=self._migrates,
        )
        self._tasks: set[asyncio.Task[Any]] = set()
        self._report_pending = False
        self._next_victim_s = 0.0
        self._victim_blocks: int | None = None
        self._is_leaving = False
        engine.attach(after_step=self._after_step, give_up_arrival=self._give_up_arrival)

    async def run(self) -> None:
        """Register, then report and take orders until cancelled."""
        await self._register()
        self._spawn(self._report())
        try:
            while True:
                message = decode_control(await self._socket.recv())
                match message:
                    case OrderMigration():
                        self._migrates()
                        self._spawn(self._migrate(message))
                    case InstanceGone():
                        self._migrator.peer_gone(message.instance_id)
                    case Unknown():
                        await self._register()
                    case _:
                        pass
        finally:
            for task in self._tasks:
                task.cancel()
            await self._migrator.close()
            self._socket.close(linger=0)
            self._context.term()

    def leave(self) -> None:
        """Ask the scheduler to drain this instance; safe from any thread."""
        self._is_leaving = True
        self._loop.call_soon_threadsafe(lambda: self._spawn(self._say_leaving()))

    async def _say_leaving(self) -> None:
        await self._socket.send(encode(InstanceLeaves(instance_id=self._instance_id)))

    async def _register(self) -> None:
        request_ids = await self._on_engine(self._engine.request_ids)
        await self._socket.send(
            encode(
                RegisterInstance(
                    spec=self._engine.spec(),
                    launch_id=self._launch_id,
                    request_ids=request_ids,
                    engine_index=self._engine.engine_index,
                    peer_endpoint=self._migrator.endpoint,
                    fingerprint=self._port.fingerprint(),
                    cannot_migrate=self._port.refusal or "",
                )
            )
        )
        if self._is_leaving:
            await self._say_leaving()  # to a scheduler that has not heard of it
        if self._prefix_blocks is not None:
            await self._tell_prefix_blocks(await self._on_engine(self._prefix_blocks.all))

    async def _report(self) -> None:
        while True:
            load, changes = await self._on_engine(self._read)
            await self._socket.send(
                encode(
                    ReportLoad(
                        load=load, num_unauthenticated=self._migrator.gate.num_unauthenticated
                    )
                )
            )
            if changes:
                await self._tell_prefix_blocks(changes)
            await asyncio.sleep(MIN_REPORT_INTERVAL_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pace.pause_s - MIN_REPORT_INTERVAL_S):
                    await self._report_now.wait()
            self._report_now.clear()
            self._report_pending = False

    async def _tell_prefix_blocks(self, changes: list[Event]) -> None:
        await self._socket.send(encode(ReportPrefixBlocks.of(self._instance_id, changes)))

    def _read(self) -> tuple[InstanceLoad, list[Event]]:
        now_s = time.monotonic()
        if now_s >= self._next_victim_s:
            self._next_victim_s = now_s + VICTIM_INTERVAL_S
            victims = choose_victims(self._victim, self._port.candidates())
            self._victim_blocks = victims[0].num_blocks if victims else None
        load = self._engine.read_load(
            num_reserved_blocks=self._migrator.num_reserved_blocks,
            num_migrations_in=self._migrator.num_incoming,
            num_migrations_out=self._migrator.num_outgoing,
            victim_blocks=self._victim_blocks,
        )
        self._pace.read(load)
        return load, self._prefix_blocks.take() if self._prefix_blocks is not None else []

    def _after_step(self) -> None:
        if self._report_pending:
            return
        if self._pace.stepped() or self._engine.load_has_changed_much():
            self._report_pending = True
            self._loop.call_soon_threadsafe(self._report_now.set)

    def _migrates(self) -> None:
        if self._pace.rests:
            self._report_now.set()
        self._pace.migrates()

    async def _migrate(self, order: OrderMigration) -> None:
        request_id = order.request_id
        if request_id is None:
            candidates = await self._on_engine(self._port.candidates)
            chosen = choose_victims(self._victim, settled(candidates, order.settle_s))
            request_id = chosen[0].request_id if chosen else None
        report = await self._migrator.migrate(order, request_id)
        await self._socket.send(encode(report))

    def _give_up_arrival(self, request_id: str) -> Future[None]:
        async def give_up() -> None:
            self._migrator.give_up_arrival(request_id)

        return asyncio.run_coroutine_threadsafe(give_up(), self._loop)

    def _abort(self, request_id: str) -> None:
        self._engine.call(lambda: self._engine.abort_requests([request_id]))

    async def _on_engine(self, function: Callable[[], T]) -> T:
        result: T = await asyncio.wrap_future(self._engine.call(function))
        return result

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("The llumlet of %s failed", self._instance_id, exc_info=task.exception())
