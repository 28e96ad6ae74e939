"""A connection that breaks while both ends live."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import zmq
import zmq.asyncio

from llumsched.frontend.routing.disconnects import BrokenConnections
from llumsched.wire.keys import Gate, PoolKeys
from tests.connections import shut_connections_to

TIMEOUT_S = 20.0
POLL_S = 0.1


def test_the_instance_whose_connection_breaks_is_told() -> None:
    async def play() -> None:
        context = zmq.asyncio.Context()
        receiver = context.socket(zmq.PULL)
        keys = PoolKeys.generate()
        gate = Gate(context, keys, [(receiver, 1024)], "the frontend", monitors=False)
        port = receiver.bind_to_random_port("tcp://127.0.0.1")
        broken: asyncio.Queue[int] = asyncio.Queue()
        connections = BrokenConnections(receiver, broken.put_nowait, gate.count)
        running = asyncio.create_task(connections.run())
        theirs = zmq.Context()
        senders = [theirs.socket(zmq.PUSH) for _ in range(3)]
        for index, sender in enumerate(senders):
            keys.connect_with(sender)
            sender.connect(f"tcp://127.0.0.1:{port}")
            sender.send(bytes([index]))
        num_heard = Counter[int]()
        # All of them, though one may be heard often before another.
        while len(num_heard) < len(senders) or min(num_heard.values()) < 2:
            (frame,) = await receiver.recv_multipart(copy=False)
            num_heard[frame.bytes[0]] += 1
            connections.heard(frame.bytes[0], frame)
            senders[frame.bytes[0]].send(frame.bytes)
        shut_connections_to([port], at_most=1)
        first = await broken.get()
        # ZMQ connects again, as if nothing had happened.
        senders[first].send(b"again")
        while (await receiver.recv()) != b"again":
            pass
        shut_connections_to([port])
        others = {await broken.get(), await broken.get()}
        assert {first} | others == {0, 1, 2}, "each is told once"
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        theirs.destroy(linger=0)
        assert gate.num_unauthenticated == 0
        gate.close()
        context.destroy(linger=0)

    run(play())


def test_a_break_is_told_before_what_comes_by_the_next_connection() -> None:
    async def play() -> None:
        context = zmq.asyncio.Context()
        receiver = context.socket(zmq.PULL)
        keys = PoolKeys.generate()
        gate = Gate(context, keys, [(receiver, 1024)], "the frontend", monitors=False)
        port = receiver.bind_to_random_port("tcp://127.0.0.1")
        broken: list[int] = []
        connections = BrokenConnections(receiver, broken.append, gate.count)
        running = asyncio.create_task(connections.run())
        await asyncio.sleep(0)
        theirs = zmq.Context()
        sender = theirs.socket(zmq.PUSH)
        keys.connect_with(sender)
        sender.connect(f"tcp://127.0.0.1:{port}")
        sender.send(b"before")
        waiting: zmq.Socket[bytes] = zmq.Socket.shadow(receiver)
        connections.heard(7, waiting.recv_multipart(copy=False)[0])
        # From here on the loop does nothing, as while it is busy with something else.
        shut_connections_to([port])
        for _ in range(int(TIMEOUT_S / POLL_S)):
            sender.send(b"after")  # what is sent before the break is noticed is lost
            if waiting.poll(timeout=int(1000 * POLL_S)):
                break
        frame = waiting.recv_multipart(copy=False)[0]
        assert not broken
        connections.heard(7, frame)
        assert broken == [7]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        theirs.destroy(linger=0)
        gate.close()
        context.destroy(linger=0)

    run(play())


def run(play: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await play

    asyncio.run(bounded())
