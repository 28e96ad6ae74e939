"""Wake-ups of launcher and frontend of a pool in which nothing happens, counted without time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from llumsched.frontend.routing.connections import ConnectedInstances
from llumsched.frontend.routing.engine_labels import EngineLabels
from llumsched.frontend.workers.launcher import QUIET_TICK_S, Happened
from llumsched.pool.instance_supervisor import TICK_S
from tests.virtual_loop import VirtualLoop


def pause_of(loop: VirtualLoop, happened: Happened, *, is_quiet: bool) -> float:
    """Seconds of the rest that begins now; the rest is over afterwards."""
    resting = loop.create_task(happened.rest(is_quiet=is_quiet))
    loop.run_ready()
    (timer,) = loop.timers()
    loop.fire(timer)
    loop.run_ready()
    assert resting.done()
    return timer.when_s


def test_the_launcher_looks_once_a_second_and_at_once_when_something_happens() -> None:
    loop = VirtualLoop()
    with loop.running():
        happened = Happened(loop)  # type: ignore[arg-type]
    happened._hurry_until_s = -1.0  # its loop has run for a while
    assert pause_of(loop, happened, is_quiet=True) == QUIET_TICK_S
    assert pause_of(loop, happened, is_quiet=False) == TICK_S, "one boots"
    resting = loop.create_task(happened.rest(is_quiet=True))
    loop.run_ready()
    assert not resting.done()
    happened.tell()
    loop.run_ready()
    assert resting.done(), "nobody waits for a timer"
    assert pause_of(loop, happened, is_quiet=True) == TICK_S, "what has begun may not be over"


class Roster:
    def __init__(self) -> None:
        self.known: dict[int, int] = {}

    def labels(self) -> Mapping[int, int]:
        return self.known


class Socket:
    def __init__(self) -> None:
        self.greeted: list[bytes] = []

    async def send_multipart(self, frames: list[bytes]) -> None:
        self.greeted.append(frames[0])


def test_a_frontend_greets_only_instances_that_it_misses() -> None:
    loop = VirtualLoop()
    roster, socket = Roster(), Socket()
    client: Any = ConnectedInstances.__new__(ConnectedInstances)
    client.resources = SimpleNamespace(engine_dead=False)
    client._roster, client.input_socket = roster, socket
    client._gone, client.labels = set(), EngineLabels(4)
    client._roster_changed = asyncio.Event()
    loop.create_task(client._greet())
    loop.run_ready()
    assert (socket.greeted, loop.timers()) == ([], []), "nothing wakes it"
    roster.known[3] = 0
    client.roster_changed()
    for num_greetings in (1, 2):
        loop.run_ready()
        assert len(socket.greeted) == num_greetings
        (timer,) = loop.timers()
        if num_greetings == 2:
            client.labels.take(3, 0)
        loop.fire(timer)
    loop.run_ready()
    assert (len(socket.greeted), loop.timers()) == (2, []), "it has come"
    loop.end_tasks()
