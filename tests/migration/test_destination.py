"""Blocks that workers of their own write: not given back before, and told when they cannot."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from llumsched.core.migration.destination.record import ReservationOptions
from llumsched.core.migration.groups import CacheGroup
from llumsched.core.migration.messages import (
    BlocksCopied,
    BlocksReserved,
    CommitAcknowledged,
    CommitRequest,
    ReleaseReservation,
    ReservationRejected,
    ReserveBlocks,
    ToSource,
)
from llumsched.engine.base import FinalState, RequestState, StepAhead
from llumsched.migration import destination as executor
from llumsched.migration.destination import IncomingMigrations
from llumsched.migration.messages import StoreBlocks

STATE = RequestState(request=b"", output_token_ids=[1], num_preemptions=0, placement_number=1)
BLOCK_IDS = [7, 3, 5]
GROUPS = (CacheGroup(block_size=4),)
PATIENCE_S = 60.0


class Destination:
    """Migrations into an engine that has room for one request, and notes what is asked of it."""

    def __init__(self, **limits: float) -> None:
        self.cancelled: list[str] = []
        self.step_time_s = 0.0
        self.step_ahead = StepAhead()
        self.answers: asyncio.Queue[ToSource] = asyncio.Queue()
        self.port: Any = SimpleNamespace(
            reserve=lambda _state: SimpleNamespace(
                block_ids=(BLOCK_IDS,), num_cached_blocks=0, grammar=None
            ),
            cancel=self.cancelled.append,
            groups=GROUPS,
        )
        self.incoming = IncomingMigrations(
            port=self.port,
            call=_at_once,
            abort=lambda _: None,
            step_time_s=lambda: self.step_time_s,
            step_ahead=lambda: self.step_ahead,
            options=ReservationOptions(),
            **limits,
        )

    async def reply(self, answer: ToSource) -> None:
        self.answers.put_nowait(answer)

    async def answer(self) -> ToSource:
        """The next one."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.answers.get()

    async def reserve(self) -> None:
        state = msgspec.msgpack.encode(STATE)
        self.incoming.take_in(
            ReserveBlocks(migration_id="m", request_id="r", source="s", state=state, groups=GROUPS),
            self.reply,
        )
        assert isinstance(await self.answer(), BlocksReserved)

    def store(
        self, first: int, write: Callable[[list[int]], Awaitable[None]]
    ) -> asyncio.Task[None]:
        """One block of a stage of three."""
        message = StoreBlocks(
            migration_id="m",
            stage=1,
            stage_first_block=0,
            stage_num_blocks=len(BLOCK_IDS),
            stage_num_sent=len(BLOCK_IDS),
            stage_num_tokens=12,
            group=0,
            first_block=first,
            num_blocks=1,
            slot=0,
            use=first,
        )
        return asyncio.create_task(self.incoming.store(message, self.reply, write))

    def release(self) -> None:
        self.incoming.take_in(ReleaseReservation(migration_id="m"), self.reply)


def _at_once(function: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(function())
    return future


def run(scenario: Callable[[Destination], Awaitable[None]], **limits: float) -> None:
    async def with_a_destination() -> None:
        destination = Destination(**limits)
        await destination.reserve()
        await scenario(destination)

    asyncio.run(with_a_destination())


def test_a_stage_is_stored_when_all_of_it_is_written() -> None:
    async def scenario(destination: Destination) -> None:
        written, go_on = [], asyncio.Event()
        begun = asyncio.Semaphore(0)

        async def write(block_ids: list[int]) -> None:
            begun.release()
            await go_on.wait()
            written.extend(block_ids)

        parts = [destination.store(first, write) for first in (2, 0, 1, 0)]
        for _ in BLOCK_IDS:
            await begun.acquire()
        assert destination.answers.empty()
        go_on.set()
        await asyncio.gather(*parts)
        assert isinstance(await destination.answer(), BlocksCopied)
        assert sorted(written) == sorted(BLOCK_IDS), "what came twice is written once"
        assert destination.cancelled == []

    run(scenario)


@pytest.mark.parametrize("num_writing", [1, 2])
def test_blocks_are_given_back_when_the_last_write_is_over(num_writing: int) -> None:
    async def scenario(destination: Destination) -> None:
        gates = [asyncio.Event() for _ in range(num_writing)]

        def write_after(gate: asyncio.Event) -> Callable[[list[int]], Awaitable[None]]:
            async def write(_: list[int]) -> None:
                await gate.wait()

            return write

        parts = [destination.store(i, write_after(gate)) for i, gate in enumerate(gates)]
        await asyncio.sleep(0)
        destination.release()
        for gate, part in zip(gates, parts, strict=True):
            assert destination.cancelled == []
            gate.set()
            await part
        assert destination.cancelled == ["r"]

    run(scenario)


def test_the_answer_to_a_stage_says_when_a_step_ends() -> None:
    async def scenario(destination: Destination) -> None:
        destination.step_ahead = StepAhead(ends_in_s=0.5, step_s=2.0)

        async def write(_: list[int]) -> None: ...

        await asyncio.gather(*(destination.store(first, write) for first in range(3)))
        answer = await destination.answer()
        assert isinstance(answer, BlocksCopied)
        assert (answer.step_ends_in_s, answer.step_s) == (0.5, 2.0)

    run(scenario)


def test_what_cannot_be_written_ends_the_migration() -> None:
    async def scenario(destination: Destination) -> None:
        async def write(_: list[int]) -> None:
            raise RuntimeError("the worker of rank 1 is gone")

        await destination.store(0, write)
        rejected = await destination.answer()
        assert isinstance(rejected, ReservationRejected)
        assert "the worker of rank 1 is gone" in rejected.reason
        assert destination.cancelled == ["r"]

    run(scenario)


def committing(
    monkeypatch: pytest.MonkeyPatch, scenario: Callable[..., Awaitable[None]], **limits: float
) -> None:
    """A request is taken over; the scenario gets the future of its next token, and the clock."""

    async def with_a_commit(destination: Destination) -> None:
        destination.step_time_s = 1e-6
        next_token: Future[None] = Future()
        clock = [5.0]
        monkeypatch.setattr(executor, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
        awaited: list[tuple[str, int]] = []

        def await_output(request_id: str, num_tokens: int) -> Future[None]:
            awaited.append((request_id, num_tokens))
            return next_token

        destination.port.commit = lambda *_: None
        destination.port.await_output = await_output
        final = FinalState(output_token_ids=[1, 2], num_computed_tokens=4, generator_state=None)
        message = CommitRequest(migration_id="m", num_blocks=0, final=msgspec.msgpack.encode(final))
        destination.incoming.take_in(message, destination.reply)
        assert awaited == [("r", 3)]
        await scenario(destination, next_token, clock)

    run(with_a_commit, **limits)


def test_the_answer_to_a_commit_says_when_the_next_token_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(
        destination: Destination, next_token: Future[None], clock: list[float]
    ) -> None:
        for _ in range(10):
            await asyncio.sleep(0)
        assert destination.answers.empty()
        clock[0] = 6.5
        next_token.set_result(None)
        clock[0] = 7.0
        assert await destination.answer() == CommitAcknowledged(migration_id="m", held_back_s=0.5)

    committing(monkeypatch, scenario)


def test_the_answer_to_a_commit_does_not_wait_long_for_the_next_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(destination: Destination, *_: Any) -> None:
        assert await destination.answer() == CommitAcknowledged(migration_id="m", held_back_s=0.0)

    committing(monkeypatch, scenario, next_token_within_s=0.0)


def test_an_answer_is_held_back_for_a_step() -> None:
    """A step of a GPU is over long before one of a CPU."""

    async def scenario(destination: Destination) -> None:
        delays_ms = []
        for destination.step_time_s in (0.0, 0.004, 0.02, 0.3):
            delays_ms.append(round(1000 * destination.incoming.answer_after_s(), 3))
        assert delays_ms == [40.0, 5.0, 25.0, 40.0]

    run(scenario)
