"""Calls to instances: an answer, a death and a caller who leaves are three different ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from llumsched.frontend.routing.pending_calls import PendingCalls

Scenario = Callable[[PendingCalls, "asyncio.Future[str]"], Awaitable[None]]


def run(scenario: Scenario) -> None:
    async def play() -> None:
        async with asyncio.timeout(10):
            await scenario(PendingCalls(), asyncio.get_running_loop().create_future())

    asyncio.run(play())


async def awaiting(future: asyncio.Future[str]) -> str:
    return await future


async def begin(calls: PendingCalls, future: asyncio.Future[str]) -> asyncio.Task[str]:
    calling = asyncio.create_task(calls.answer(1, awaiting(future)))
    await asyncio.sleep(0)
    return calling


def test_an_answer_is_returned_though_another_instance_dies() -> None:
    async def scenario(calls: PendingCalls, future: asyncio.Future[str]) -> None:
        calling = await begin(calls, future)
        calls.died(2)
        future.set_result("done")
        assert await calling == "done"

    run(scenario)


def test_a_call_to_an_instance_that_dies_fails() -> None:
    async def scenario(calls: PendingCalls, future: asyncio.Future[str]) -> None:
        calling = await begin(calls, future)
        calls.died(1)
        with pytest.raises(ConnectionError, match="died before it answered"):
            await calling

    run(scenario)


@pytest.mark.parametrize("dies_first", [True, False])
def test_a_caller_who_leaves_as_the_instance_dies_has_left(dies_first: bool) -> None:
    async def scenario(calls: PendingCalls, future: asyncio.Future[str]) -> None:
        calling = await begin(calls, future)
        if dies_first:
            calls.died(1)
            await asyncio.sleep(0)
        calling.cancel()
        calls.died(1)
        await asyncio.wait({calling})
        assert calling.cancelled()

    run(scenario)


def test_a_caller_who_leaves_ends_the_call() -> None:
    async def scenario(calls: PendingCalls, future: asyncio.Future[str]) -> None:
        calling = await begin(calls, future)
        calling.cancel()
        await asyncio.wait({calling})
        await asyncio.sleep(0)
        assert calling.cancelled()
        assert future.cancelled()

    run(scenario)
