"""Whole migrations between two processes on one device: migrators and transports are the shipped
ones, the engines fake ones that compute each token from what the KV cache holds.

A process here is one instance. It steps its engine on a thread, runs its migrator on a loop, and is
told through a pipe what to do. One that is told to die ends without a word at the next message of a
kind: a destination in the middle of a stage or at the commit, a source between two stages.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from llumsched.core.migration.messages import ToDestination, ToSource
from llumsched.core.migration.source.record import MigrationOptions
from llumsched.core.transfer_options import AUTO, TransferOptions
from llumsched.engine.base import Refusal, StepAhead
from llumsched.migration.migrator import Migrator
from llumsched.wire.control import OrderMigration, ReportMigration
from llumsched.wire.keys import PoolKeys
from tests.fake_engine.instance import FakeInstanceEngine, FakeSettings
from tests.fake_engine.request import expected_output

NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 400, 150
NUM_BLOCKS, BLOCK_SIZE = 128, 8
STEP_S = 0.004
PATIENCE_S = 60.0
NOT_MOVED = "not moved: "

Outputs = dict[int, int]
"""Tokens by position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One instance, and where its KV cache is."""

    name: str
    device: str
    keys: PoolKeys


class _Instance:
    """The side of the process."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        settings = FakeSettings(
            engine_index=0,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            step_s=STEP_S,
            device=plan.device,
        )
        self.engine = FakeInstanceEngine(settings, instance_id=plan.name)
        self._migrator: Migrator | None = None
        self._moves: dict[str, asyncio.Task[ReportMigration]] = {}
        threading.Thread(target=self.engine.run, name="engine", daemon=True).start()

    async def serve(self, orders: Connection) -> None:
        """Do as told: the name of a method below, and its arguments."""
        orders.send(None)
        while True:
            name, *arguments = await asyncio.to_thread(orders.recv)
            orders.send(await getattr(self, name)(*arguments))

    async def configure(self, transport: str) -> str:
        """A new migrator; its endpoint."""
        if self._migrator is not None:
            await self._migrator.close()
        self._migrator = Migrator(
            instance_id=self._plan.name,
            port=self.engine.migration,
            call=self.engine.call,
            abort=self.engine.migration.abort,
            keys=self._plan.keys,
            host="127.0.0.1",
            step_time_s=lambda: STEP_S,
            step_ahead=StepAhead,
            options=MigrationOptions(),
            # Several parts a stage, whose slots are used again and again.
            transfer=TransferOptions(
                transport=transport, core_share=1.0, staging_slots=2, staging_slot_mb=0.003
            ),
        )
        return self._migrator.endpoint

    async def add(self, request_id: str, prompt: list[int]) -> None:
        """Serve a request."""
        self.engine.call(
            lambda: self.engine.migration.add_request(request_id, prompt, NUM_OUTPUT_TOKENS)
        )

    async def start_move(self, order: OrderMigration) -> None:
        """Begin to move a request away."""
        assert self._migrator is not None
        move = self._migrator.migrate(order, order.request_id)
        self._moves[order.migration_id] = asyncio.create_task(move)

    async def report(self, migration_id: str) -> ReportMigration:
        """Outcome of a move."""
        return await self._moves[migration_id]

    async def peer_gone(self, name: str) -> None:
        """Hear of a death, as the scheduler tells of it."""
        assert self._migrator is not None
        self._migrator.peer_gone(name)

    async def tokens(self, request_id: str) -> Outputs:
        """Tokens that were sampled here."""
        return dict(self.engine.outputs.get(request_id, {}))

    async def num_blocks_held(self) -> int:
        """By requests, migrations and reservations, each counted by its holders."""

        def count() -> int:
            self.engine.migration.check()
            return NUM_BLOCKS - self.engine.migration.pool.num_free_blocks

        return await asyncio.wrap_future(self.engine.call(count))

    async def die_at(self, kind: str) -> None:
        """End at the next message of this kind."""
        assert self._migrator is not None
        _die_at(kind, self._migrator)


def _die_at(kind: str, migrator: Migrator) -> None:
    """Before there is a link: it keeps what it gives its answers to."""
    handle, take_in = migrator._handle, migrator._outgoing.take_in

    async def handle_or_die(identity: bytes, message: Any, payload: Any) -> None:
        if type(message).__name__ == kind:
            os._exit(9)
        await handle(identity, message, payload)

    def take_in_or_die(message: ToSource) -> ToDestination | None:
        if type(message).__name__ == kind:
            os._exit(9)
        return take_in(message)

    objects: list[tuple[Any, str, Any]] = [
        (migrator, "_handle", handle_or_die),
        (migrator._outgoing, "take_in", take_in_or_die),
    ]
    for changed, name, method in objects:
        setattr(changed, name, method)


def _run(plan: Plan, orders: Connection) -> None:
    torch.set_num_threads(1)
    asyncio.run(_Instance(plan).serve(orders))


class Peer:
    """An instance, seen from the process that started it."""

    def __init__(self, plan: Plan) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = plan.name
        self._orders, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(plan, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._answer()
        self.endpoint = ""

    def ask(self, name: str, *arguments: Any) -> Any:
        """Have it call a method of its own; the answer. Raises ``EOFError`` if it has died."""
        self._orders.send((name, *arguments))
        return self._answer()

    def _answer(self) -> Any:
        if not self._orders.poll(PATIENCE_S):
            raise TimeoutError(f"{self.name} does not answer")
        return self._orders.recv()

    def end(self) -> None:
        self.process.kill()
        self.process.join()


class Pair:
    """Two instances on one device, and requests that move from the first to the second."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._keys = PoolKeys.generate()
        self._num_requests = 0
        self._peers: dict[str, Peer] = {}

    def _peer(self, name: str) -> Peer:
        """The instance of this name, started if there is none that lives."""
        if name not in self._peers:
            plan = Plan(name=name, device=self._device, keys=self._keys)
            self._peers[name] = Peer(plan)
        return self._peers[name]

    @property
    def source(self) -> Peer:
        return self._peer("a")

    @property
    def destination(self) -> Peer:
        return self._peer("b")

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self._peers.values():
            peer.end()

    def move(self, transport: str) -> str:
        """Move a request; what is to be said of it. Raises ``AssertionError`` if it went wrong."""
        self._configure(transport)
        # The first hand-shake may outlast a request, where a library has to be started for it.
        for _ in range(2):
            request_id, order = self._decoding()
            self.source.ask("start_move", order)
            report: ReportMigration = self.source.ask("report", order.migration_id)
            if report.cause != Refusal.NOT_SCHEDULABLE:
                break
        if report.outcome != "committed":
            return f"{NOT_MOVED}{report.reason}"
        assert report.statistics is not None
        assert transport in (AUTO, report.statistics.transport), report
        self._finish(request_id, self.source, self.destination)
        return (
            f"{report.statistics.transport}, {report.statistics.num_blocks} blocks in "
            f"{report.statistics.num_stages} stages, {1000 * report.statistics.total_s:.0f} ms"
        )

    def survive(self, transport: str, *, dead: str, dies_at: str) -> str:
        """One end dies in the middle: the request goes on at the source, or nothing is held for it
        at the destination."""
        self._configure(transport)
        request_id, order = self._decoding()
        dying, survivor = (
            (self.source, self.destination) if dead == "a" else (self.destination, self.source)
        )
        dying.ask("die_at", dies_at)
        self.source.ask("start_move", order)
        dying.process.join(PATIENCE_S)
        assert not dying.process.is_alive(), f"{dead} did not come to {dies_at}"
        del self._peers[dead]
        survivor.ask("peer_gone", dead)
        if dead == "b":
            report: ReportMigration = survivor.ask("report", order.migration_id)
            assert report.outcome == "aborted", report
            self._finish(request_id, survivor)
            return f"the request went on: {report.reason}"
        until(lambda: not survivor.ask("num_blocks_held"), "the destination frees its reservation")
        return "the destination holds nothing"

    def _configure(self, transport: str) -> None:
        for peer in (self.source, self.destination):
            peer.endpoint = peer.ask("configure", transport)

    def _decoding(self) -> tuple[str, OrderMigration]:
        """A new request that decodes at the source, and the order to move it."""
        source, destination = self.source, self.destination
        self._num_requests += 1
        request_id = f"r{self._num_requests}"
        source.ask("add", request_id, self._prompt())
        until(lambda: len(source.ask("tokens", request_id)) >= 3, "the request decodes")
        return request_id, OrderMigration(
            migration_id=f"m{self._num_requests}",
            destination=destination.name,
            destination_endpoint=destination.endpoint,
            request_id=request_id,
            reason="a check",
        )

    def _prompt(self) -> list[int]:
        """Of the latest request: another one each time, so that nothing is cached."""
        first = self._num_requests * NUM_PROMPT_TOKENS
        return list(range(first, first + NUM_PROMPT_TOKENS))

    def _finish(self, request_id: str, *peers: Peer) -> None:
        """Wait for the last token. All must be those of an engine that was left alone."""
        found: Outputs = {}

        def is_over() -> bool:
            for peer in peers:
                found.update(peer.ask("tokens", request_id))
            return len(found) >= NUM_OUTPUT_TOKENS

        until(is_over, "the request ends")
        tokens = [found[position] for position in range(NUM_OUTPUT_TOKENS)]
        assert tokens == expected_output(self._prompt(), NUM_OUTPUT_TOKENS), "the tokens differ"
        until(lambda: not any(peer.ask("num_blocks_held") for peer in peers), "all blocks are free")


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until it is so; raises ``TimeoutError`` if that takes too long."""
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end_s:
            raise TimeoutError(f"not so within {PATIENCE_S:.0f} s: {what}")
        time.sleep(STEP_S)
