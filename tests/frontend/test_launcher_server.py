"""A launcher and its frontends, over the channels that they have, in one process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llumsched.frontend.routing.client import RoutingEngineClient
from llumsched.frontend.routing.engine_labels import EngineLabels
from llumsched.frontend.routing.instance_events import InstanceEventBridge
from llumsched.frontend.routing.routes import Routes
from llumsched.frontend.workers.channel import Channel, ChannelClosed
from llumsched.frontend.workers.launcher_client import LauncherClient
from llumsched.frontend.workers.launcher_server import LauncherServer
from llumsched.frontend.workers.messages import PoolStatus

PATIENCE_S = 20.0


def status(**changes: Any) -> PoolStatus:
    values: dict[str, Any] = {
        "max_instances": 8,
        "berths": (),
        "frontends": (),
        "labels": {4: 0},
        "num_labels_used": 2,
        "unproven": {"frontend-0": 3},
    }
    return PoolStatus(**(values | changes))


class Wishes:
    """A supervisor that notes what is wanted of it."""

    def __init__(self) -> None:
        self.notes: list[tuple[object, ...]] = []

    def replace(self, instance_id: str) -> None:
        self.notes.append(("replace", instance_id))

    def limit(self, num_instances: int) -> None:
        self.notes.append(("limit", num_instances))

    def connection_broke(self, instance_id: str) -> None:
        self.notes.append(("broke", instance_id))


class Member:
    """One frontend; ``gone`` has what it was told of instances."""

    def __init__(self, hub: LauncherServer, index: int) -> None:
        ours, theirs = socket.socketpair()
        self.index = index
        self.lost = threading.Event()
        self.routes = Routes()
        self.labels = EngineLabels(4)
        self.gone: list[tuple[int, bool]] = []
        self.num_counted = 0
        self.breaks: Callable[[int], None] | None = None
        self.supervision = LauncherClient(
            Channel(theirs), f"frontend-{index}", launcher_lost=self.lost.set
        )
        hub.join(index, Channel(ours))

    def follow(self) -> None:
        client = SimpleNamespace(
            routes=self.routes,
            labels=self.labels,
            tell_of_breaks=self._tell_of_breaks,
            roster_changed=lambda: None,
        )
        departures = SimpleNamespace(gone=self._gone)
        self.supervision.follow(
            cast(RoutingEngineClient, client), cast(InstanceEventBridge, departures)
        )
        self.supervision.serves()

    def _gone(self, index: int, *, expected: bool, is_counted: bool) -> None:
        self.gone.append((index, expected))
        self.num_counted += is_counted and not expected

    def _tell_of_breaks(self, connection_broke: Callable[[int], None]) -> None:
        self.breaks = connection_broke


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def until_told(member: Member) -> None:
    """Until it knows how the pool is."""
    await until(lambda: bool(member.supervision.labels()))


@pytest.fixture
def hub() -> Iterator[LauncherServer]:
    hub = LauncherServer()
    yield hub
    for index in range(4):
        hub.leave(index)


def test_frontends_know_how_the_pool_is(hub: LauncherServer) -> None:
    async def play() -> None:
        early = Member(hub, 0)
        hub.tell(status())
        late = Member(hub, 1)
        for member in (early, late):
            await until_told(member)
            assert member.supervision.labels() == {4: 0}
            assert member.supervision.unproven() == {"frontend-0": 3}
            member.follow()
            assert member.labels.num_ever_taken == 2
        hub.tell(status(num_labels_used=3))
        await until(lambda: early.labels.num_ever_taken == 3)

    asyncio.run(play())


def test_an_instance_that_goes_while_a_frontend_boots_is_told_later(hub: LauncherServer) -> None:
    async def play() -> None:
        member = Member(hub, 0)
        hub.instance_lost(7)
        hub.tell(status())
        await until_told(member)
        member.follow()
        assert member.gone == [(7, False)]
        hub.instance_lost(8, expected=True)
        await until(lambda: member.gone == [(7, False), (8, True)])

    asyncio.run(play())


def test_an_instance_that_dies_is_counted_by_one_frontend(hub: LauncherServer) -> None:
    async def play() -> None:
        members = [Member(hub, index) for index in range(3)]
        for member in members[1:]:
            member.follow()
        await until(lambda: hub.serves(1) and hub.serves(2))
        hub.instance_lost(5)
        await until(lambda: all(member.gone for member in members[1:]))
        assert [member.num_counted for member in members] == [0, 1, 0]

    asyncio.run(play())


def test_what_operators_want_reaches_the_supervisor(hub: LauncherServer) -> None:
    async def play() -> None:
        wishes = Wishes()
        hub.supervise_with(wishes)
        member = Member(hub, 0)
        member.follow()
        member.supervision.replace("instance-1")
        member.supervision.limit(3)
        assert member.breaks is not None
        member.breaks(2)
        await until(lambda: len(wishes.notes) == 3)
        assert wishes.notes == [("replace", "instance-1"), ("limit", 3), ("broke", "instance-2")]

    asyncio.run(play())


def test_a_frontend_learns_the_requests_of_all_others(hub: LauncherServer) -> None:
    async def play() -> None:
        members = [Member(hub, index) for index in range(3)]
        for member in members:
            member.routes.open(f"r{member.index}", f"cmpl-{member.index}")
            member.follow()
        await until(lambda: all(hub.serves(index) for index in range(3)))
        found = await members[0].supervision.requests()
        assert {(r.request_id, r.external_id, r.frontend_id) for r in found} == {
            ("r1", "cmpl-1", "frontend-1"),
            ("r2", "cmpl-2", "frontend-2"),
        }

    asyncio.run(play())


def test_one_that_dies_is_not_waited_for(hub: LauncherServer) -> None:
    async def play() -> None:
        asker, dying = Member(hub, 0), Member(hub, 1)
        asker.follow()
        dying.supervision.serves()  # and answers nothing
        await until(lambda: hub.serves(1))
        asking = asyncio.create_task(asker.supervision.requests())
        await until(lambda: bool(hub._rounds))
        assert not asking.done()
        hub.leave(1)
        assert list(await asking) == []
        await until(dying.lost.is_set)

    asyncio.run(play())


def test_alone_for_a_while(hub: LauncherServer) -> None:
    async def play() -> None:
        member = Member(hub, 0)
        member.follow()
        assert list(await member.supervision.requests()) == []

    asyncio.run(play())


def test_the_end_of_the_launcher_is_the_end_of_its_frontends(hub: LauncherServer) -> None:
    member = Member(hub, 0)
    hub.leave(0)
    assert member.lost.wait(PATIENCE_S)


def test_one_that_does_not_read_is_left() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours, send_timeout_s=0.1)
    more_than_fits = bytes(8 << 20)
    with theirs, pytest.raises(ChannelClosed):
        channel.send(more_than_fits)
