"""Every socket of a pool against strangers of every kind: none is let in, and nothing is kept."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import zmq
import zmq.asyncio

from llumsched.config import Config
from llumsched.frontend.routing.disconnects import BrokenConnections
from llumsched.frontend.routing.sockets import FrontendSockets
from llumsched.pool.heartbeat_listener import HeartbeatListener
from llumsched.scheduler.controller import Controller
from llumsched.wire import keys
from llumsched.wire.keys import Gate, PoolKeys
from llumsched.wire.ping import BEAT_NUM_BYTES
from tests.wire import strangers

PATIENCE_S = 30
# Of the whole process, whatever it does meanwhile; a giant would take gigabytes.
MAX_GROWTH_NUM_BYTES = 64 << 20
KEYS = PoolKeys.generate()


@dataclass
class Door:
    """A socket that is bound, the gate before it, and whether anything has come in."""

    port: int
    gate: Gate
    has_heard: Callable[[], bool]
    member: int
    """The type of socket that members come with."""

    def await_unproven(self, count: int) -> None:
        """Wait until so many have been counted."""
        deadline_s = time.monotonic() + PATIENCE_S
        while self.gate.num_unauthenticated != count:
            assert time.monotonic() < deadline_s, (self.gate.num_unauthenticated, count)
            time.sleep(0.005)


def port_of(socket: zmq.Socket[Any]) -> int:
    return int(socket.get_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1])


def sync(socket: zmq.Socket[Any]) -> zmq.Socket[bytes]:
    return zmq.Socket.shadow(socket)


@contextmanager
def scheduler(handshake_timeout_s: float = keys.HANDSHAKE_TIMEOUT_S) -> Iterator[Door]:
    controller, context = Controller(Config.default("latency")), zmq.asyncio.Context()
    controller.bind(context, "127.0.0.1", KEYS, handshake_timeout_s=handshake_timeout_s)
    socket = controller._socket
    assert socket is not None
    assert controller._gate is not None
    yield Door(port_of(socket), controller._gate, lambda: bool(sync(socket).poll(0)), zmq.DEALER)
    controller.close()
    context.destroy(linger=0)


@contextmanager
def heartbeats() -> Iterator[Door]:
    listener = HeartbeatListener("127.0.0.1", KEYS)
    yield Door(port_of(listener._socket), listener.gate, lambda: bool(listener.heard()), zmq.PUSH)
    listener.close()


@contextmanager
def frontend(which: str) -> Iterator[Door]:
    sockets = FrontendSockets("127.0.0.1", KEYS, 1 << 20)
    socket = getattr(sockets, which)
    loop = asyncio.new_event_loop()
    connections = BrokenConnections(socket, lambda _: None, sockets.gate.count)
    counting = loop.create_task(connections.run())
    thread = threading.Thread(target=loop.run_until_complete, args=(asyncio.wait([counting]),))
    thread.start()
    member = zmq.PUSH if which == "output" else zmq.DEALER
    yield Door(port_of(socket), sockets.gate, lambda: bool(sync(socket).poll(0)), member)
    loop.call_soon_threadsafe(counting.cancel)
    thread.join()
    loop.close()
    sockets.close()


DOORS: Mapping[str, Callable[[], AbstractContextManager[Door]]] = {
    "scheduler": scheduler,
    "heartbeats": heartbeats,
    "frontend's requests": lambda: frontend("input"),
    "frontend's outputs": lambda: frontend("output"),
}


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> Iterator[Door]:
    with DOORS[request.param]() as door:
        yield door


def test_strangers_are_turned_away_and_counted(door: Door) -> None:
    resident = psutil.Process().memory_info().rss
    for number, (name, message) in enumerate(strangers.BYTES.items(), start=1):
        strangers.say(door.port, message)
        door.await_unproven(number)
        assert not door.has_heard(), name
    assert psutil.Process().memory_info().rss - resident < MAX_GROWTH_NUM_BYTES


def test_nobody_comes_in_with_other_keys(door: Door) -> None:
    knocks = [strangers.nobody, strangers.other_pool, strangers.half_known(KEYS)]
    for number, prepare in enumerate(knocks, start=1):
        strangers.with_keys(door.port, prepare)
        door.await_unproven(number)
        assert not door.has_heard()


def test_who_says_too_little_is_not_waited_for() -> None:
    with scheduler(handshake_timeout_s=0.2) as door:
        for name, message in strangers.TRUNCATED.items():
            heard = strangers.say(door.port, message)
            assert len(heard) <= 64, f"{name}: more than a greeting"
        door.await_unproven(len(strangers.TRUNCATED))


def test_members_come_in_between_strangers(door: Door) -> None:
    for _ in range(3):
        strangers.say(door.port, strangers.BYTES["noise"])
    context = zmq.Context()
    member = context.socket(door.member)
    member.linger = 0
    KEYS.connect_with(member)
    member.connect(f"tcp://127.0.0.1:{door.port}")
    member.send(bytes(BEAT_NUM_BYTES))
    deadline_s = time.monotonic() + PATIENCE_S
    while not door.has_heard():
        assert time.monotonic() < deadline_s, "a member was not let in"
        time.sleep(0.005)
    door.await_unproven(3)
    context.destroy(linger=0)


def test_a_message_that_is_too_long_ends_its_connection() -> None:
    """Also of a member: nothing says so long a thing there."""
    context = zmq.Context()
    with scheduler() as door:
        member = context.socket(zmq.DEALER)
        member.linger = 0
        member.setsockopt(zmq.RECONNECT_IVL, -1)
        KEYS.connect_with(member)
        monitor = member.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        member.connect(f"tcp://127.0.0.1:{door.port}")
        member.send(bytes(keys.MAX_CONTROL_NUM_BYTES + (1 << 20)))
        assert monitor.poll(1000 * PATIENCE_S)
        assert not door.has_heard()
        member.disable_monitor()
        context.destroy(linger=0)


def test_without_its_thread_nobody_comes_in() -> None:
    """Not even a member: the alternative is everybody."""
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    gate = Gate(context, KEYS, [(socket, 1024)], "the door")
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    gate.close()
    gate.close()  # twice does no harm
    strangers.with_keys(port, KEYS.connect_with)
    assert not socket.poll(0)
    context.destroy(linger=0)


def test_keys_do_not_show_their_secrets() -> None:
    shown = f"{KEYS!r} {KEYS}"
    assert KEYS.binding_secret.decode() not in shown
    assert KEYS.connecting_secret.decode() not in shown
    assert PoolKeys.generate() != KEYS
