"""Frontends that the launcher has not started, in one process, over the connections that they
have."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import zmq

from llumsched.frontend.routing.client import RoutingEngineClient
from llumsched.frontend.routing.engine_labels import EngineLabels
from llumsched.frontend.routing.instance_events import InstanceEventBridge
from llumsched.frontend.routing.routes import Routes
from llumsched.frontend.workers import launcher_client, remote_channel
from llumsched.frontend.workers.channel import ChannelClosed
from llumsched.frontend.workers.door import FrontDoor
from llumsched.frontend.workers.joined import JoinedFrontends
from llumsched.frontend.workers.launcher_client import LauncherClient
from llumsched.frontend.workers.launcher_server import LauncherServer
from llumsched.frontend.workers.messages import (
    Admitted,
    JoinPool,
    PoolStatus,
    decode_from_launcher,
)
from llumsched.frontend.workers.remote_channel import GONE, DoorBell
from llumsched.wire.control import encode
from llumsched.wire.keys import PoolKeys

HOST = "127.0.0.1"
KEYS = PoolKeys.generate()
PATIENCE_S = 20.0
FIRST_INDEX = 2
WISH = JoinPool(pid=7, node="10.0.0.7", input_address="tcp://in", output_address="tcp://out")
STATUS = PoolStatus(
    max_instances=8, berths=(), frontends=(), labels={4: 0}, num_labels_used=1, unproven={}
)


class Instances:
    """Connections of instances to frontends, as the pool is told; ``settled`` are the frontends of
    which all has ended."""

    def __init__(self) -> None:
        self.notes: list[tuple[object, ...]] = []
        self.settled: set[int] = set()

    def connect_frontend(self, client_index: int, input_address: str, output_address: str) -> None:
        self.notes.append(("connect", client_index, input_address, output_address))

    def forget_frontend(self, client_index: int) -> Callable[[], bool]:
        self.notes.append(("forget", client_index))
        return lambda: client_index in self.settled


class Launcher:
    def __init__(self) -> None:
        self.hub = LauncherServer()
        self.instances = Instances()
        self.joined = JoinedFrontends(self.hub, self.instances, FIRST_INDEX)
        self.door = FrontDoor(HOST, KEYS, self.joined.admit)

    def states(self) -> dict[str, str]:
        self.joined.tick()
        return {status.frontend_id: status.state for status in self.joined.describe()}


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.door.close()


class Guest:
    """A frontend that has joined."""

    def __init__(self, launcher: Launcher) -> None:
        self.bell = DoorBell(launcher.door.endpoint, KEYS, WISH)
        admitted = decode_from_launcher(self.bell.channel.receive(PATIENCE_S))
        assert isinstance(admitted, Admitted)
        self.index = admitted.client_index
        self.lost = threading.Event()
        self.supervision = LauncherClient(
            self.bell.channel, f"frontend-{self.index}", self.lost.set, has_joined=True
        )

    def dies(self) -> None:
        """As its process: nothing is said."""
        self.bell.channel.is_closed = True  # it beats no more
        self.bell._post.close()
        self.bell._socket.close(linger=0)


def until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_each_has_a_place_of_its_own_and_knows_how_the_pool_is(launcher: Launcher) -> None:
    guests = [Guest(launcher), Guest(launcher)]
    assert [guest.index for guest in guests] == [2, 3]
    assert launcher.states() == {"frontend-2": "booting", "frontend-3": "booting"}
    assert launcher.instances.notes == [
        ("connect", index, "tcp://in", "tcp://out") for index in (2, 3)
    ]
    launcher.hub.tell(STATUS)
    for guest in guests:
        until(lambda guest=guest: guest.supervision.is_told)  # type: ignore[misc]
        assert guest.supervision.labels() == {4: 0}
    guests[1].supervision.serves()
    until(lambda: launcher.states()["frontend-3"] == "serving")
    (status,) = (s for s in launcher.joined.describe() if s.state == "serving")
    assert (status.pid, status.node) == (7, "10.0.0.7")
    for guest in guests:
        guest.bell.close()


def test_one_that_dies_is_forgotten_and_others_are_not(launcher: Launcher) -> None:
    victim, other = Guest(launcher), Guest(launcher)
    victim.dies()
    until(lambda: launcher.states()["frontend-2"] == "leaving")
    assert launcher.instances.notes[2:] == [("forget", 2)]
    assert not launcher.joined.is_quiet
    launcher.instances.settled.add(2)
    assert launcher.states() == {"frontend-3": "booting"}
    assert not launcher.hub.has(2)
    assert Guest(launcher).index == 4, "no place is anybody's twice"
    assert not other.lost.is_set()
    other.bell.close()


def test_one_that_leaves_says_so(launcher: Launcher) -> None:
    guest = Guest(launcher)
    guest.bell.close()
    until(lambda: launcher.states() == {"frontend-2": "leaving"})


def test_one_that_is_silent_is_gone_and_told_so_when_it_is_back(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a machine that was suspended."""
    guest = Guest(launcher)
    beat = guest.bell._post._beat
    guest.bell._post._beat = lambda: None
    # Of the launcher, which looks at it by its own clock.
    door: Any = launcher.door
    for channel in door._channels.values():
        channel.heard_s -= 2 * remote_channel.SILENT_S
    until(lambda: launcher.states() == {"frontend-2": "leaving"})
    guest.bell._post._beat = beat
    assert guest.lost.wait(PATIENCE_S)
    with pytest.raises(ChannelClosed):
        guest.bell.channel.send(b"anything")
    guest.bell.close()


def test_one_whose_launcher_is_gone_ends(launcher: Launcher) -> None:
    guest = Guest(launcher)
    launcher.door.close()
    assert guest.lost.wait(PATIENCE_S)
    assert guest.supervision.is_lost
    guest.bell.close()


def test_one_that_hears_nothing_of_its_launcher_ends(launcher: Launcher) -> None:
    guest = Guest(launcher)
    guest.bell.channel.heard_s -= 2 * remote_channel.SILENT_S
    launcher.door._post._beat = lambda: None
    assert guest.lost.wait(PATIENCE_S)
    guest.bell.close()


def test_whoever_is_unknown_is_told_to_end(launcher: Launcher) -> None:
    """A connection was made anew, of a frontend that is forgotten."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    KEYS.connect_with(socket)
    socket.connect(launcher.door.endpoint)
    socket.send(encode(STATUS))
    assert socket.poll(int(1000 * PATIENCE_S))
    assert socket.recv() == GONE
    assert not launcher.states()
    context.destroy(linger=0)


def test_whoever_has_not_the_keys_of_the_pool_does_not_come_in(launcher: Launcher) -> None:
    bell = DoorBell(launcher.door.endpoint, PoolKeys.generate(), WISH)
    until(lambda: launcher.door.gate.num_unauthenticated > 0)
    with pytest.raises(ChannelClosed, match="nothing came"):
        bell.channel.receive(0.1)
    assert not launcher.states()
    bell.close()


class Client:
    """``RoutingEngineClient``, to the connection to one instance that breaks."""

    def __init__(self, *up: int) -> None:
        self.up = set(up)
        self.routes = Routes()
        self.labels = EngineLabels(4)
        self.breaks: Callable[[int], None] = lambda _: None

    def tell_of_breaks(self, breaks: Callable[[int], None]) -> None:
        self.breaks = breaks

    def roster_changed(self) -> None:
        pass

    def is_up(self, instance: int) -> bool:
        return instance in self.up


@pytest.mark.parametrize("lives_on", [True, False])
def test_its_own_broken_connection_ends_it_and_no_instance(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, lives_on: bool
) -> None:
    monkeypatch.setattr(launcher_client, "BROKEN_PATIENCE_S", 0.0)
    broke: list[str] = []
    launcher.hub.supervise_with(cast(Any, SimpleNamespace(connection_broke=broke.append)))
    guest = Guest(launcher)
    client = Client(4)

    async def play() -> None:
        departures = SimpleNamespace(gone=lambda *_, **__: None)
        guest.supervision.follow(
            cast(RoutingEngineClient, client), cast(InstanceEventBridge, departures)
        )
        client.breaks(4)
        if not lives_on:
            client.up.clear()
        for _ in range(3):
            await asyncio.sleep(0)

    asyncio.run(play())
    assert guest.lost.is_set() == lives_on
    assert not broke
    guest.bell.close()
