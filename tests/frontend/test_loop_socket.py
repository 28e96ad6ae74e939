"""A socket on the loop: nothing is missed, whatever else happens to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import zmq

from llumsched.frontend.routing.sockets import MAX_MESSAGES_AT_ONCE, LoopSocket

TIMEOUT_S = 20.0
ENDPOINT = "inproc://loop-socket"
Pair = tuple["zmq.Socket[bytes]", "zmq.Socket[bytes]"]


def play(scenario: Callable[[Pair], Awaitable[None]]) -> None:
    async def bounded() -> None:
        context = zmq.Context()
        ours, theirs = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        ours.bind(ENDPOINT)
        theirs.connect(ENDPOINT)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await scenario((ours, theirs))
        finally:
            context.destroy(linger=0)

    asyncio.run(bounded())


def test_more_messages_than_are_taken_in_at_once_all_come_in_order() -> None:
    async def scenario(pair: Pair) -> None:
        ours, theirs = pair
        heard: asyncio.Queue[bytes] = asyncio.Queue()
        messages = [str(number).encode() for number in range(3 * MAX_MESSAGES_AT_ONCE)]
        for message in messages[:-1]:
            theirs.send(message)
        link = LoopSocket(ours, lambda frames: heard.put_nowait(frames[0].bytes))
        link.start()
        found = [await heard.get() for _ in messages[:-1]]
        theirs.send(messages[-1])
        assert [*found, await heard.get()] == messages
        link.stop()

    play(scenario)


def test_a_message_that_came_as_another_was_sent_is_taken_in() -> None:
    async def scenario(pair: Pair) -> None:
        ours, theirs = pair
        heard: asyncio.Queue[bytes] = asyncio.Queue()
        link = LoopSocket(ours, lambda frames: heard.put_nowait(frames[0].bytes))
        link.start()
        for _ in range(100):
            await asyncio.sleep(0)
            theirs.send(b"told")
            link.send(b"asked")
            assert await heard.get() == b"told"
        link.stop()

    play(scenario)


def test_an_error_with_one_message_keeps_no_other_from_being_taken_in() -> None:
    async def scenario(pair: Pair) -> None:
        ours, theirs = pair
        failures: list[str] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: failures.append(str(context["exception"]))
        )
        heard: asyncio.Queue[bytes] = asyncio.Queue()

        def take_in(frames: list[zmq.Frame]) -> None:
            if frames[0].bytes == b"odd":
                raise ValueError("odd")
            heard.put_nowait(frames[0].bytes)

        for message in (b"odd", b"even"):
            theirs.send(message)
        link = LoopSocket(ours, take_in)
        link.start()
        assert await heard.get() == b"even"
        assert failures == ["odd"]
        link.stop()

    play(scenario)


def test_nothing_is_taken_in_once_it_is_stopped() -> None:
    async def scenario(pair: Pair) -> None:
        ours, theirs = pair
        heard: list[bytes] = []
        has_heard = asyncio.Event()

        def take_in(frames: list[zmq.Frame]) -> None:
            heard.append(frames[0].bytes)
            has_heard.set()
            link.stop()

        theirs.send(b"first")
        theirs.send(b"second")
        link = LoopSocket(ours, take_in)
        link.start()
        await has_heard.wait()
        link.read()
        link.stop()
        assert heard == [b"first"]
        assert ours.recv() == b"second"

    play(scenario)
