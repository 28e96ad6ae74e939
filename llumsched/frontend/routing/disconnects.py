"""Which instance's connection breaks.

ZMQ makes a broken connection again by itself, and says nothing of the messages that were lost with
it: tokens, requests. So an instance whose connection breaks is as good as dead, whether its process
lives or not. ZMQ tells the file descriptor of what broke; of a message, the one it came by.

Invariant: a break is told before anything that comes by a connection made after it.
This module does not know what becomes of the instance.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from llumsched.frontend.routing.sockets import LoopSocket
from llumsched.wire.keys import COUNTED_EVENTS


class BrokenConnections:
    """Broken connections of one socket that instances connect to.

    Args:
        broken: called with the index of an instance whose connection has broken.
        count: called with everything that becomes of a connection, of whomever it is.
    """

    def __init__(
        self,
        socket: zmq.asyncio.Socket,
        broken: Callable[[int], None],
        count: Callable[[int], None],
    ) -> None:
        self._monitor = socket.get_monitor_socket(COUNTED_EVENTS)
        self._events = LoopSocket(zmq.Socket.shadow(self._monitor), self._happened)
        self._count = count
        self._socket = socket
        self._broken = broken
        self._instances: dict[int, int] = {}
        self._known: set[int] = set()

    def heard(self, instance: int, frame: zmq.Frame) -> None:
        """A message of an instance has come; breaks that were before it are told now."""
        self._events.read()
        if instance not in self._known:
            self._known.add(instance)
            self._instances[frame.get(zmq.SRCFD)] = instance

    async def run(self) -> None:
        """Tell of every break, until cancelled."""
        self._events.start()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._events.stop()
            if not self._socket.closed:
                self._socket.disable_monitor()
            self._monitor.close(linger=0)

    def _happened(self, frames: list[zmq.Frame]) -> None:
        event = parse_monitor_message([frame.bytes for frame in frames])
        self._count(event["event"])
        if event["event"] == zmq.EVENT_DISCONNECTED:
            instance = self._instances.pop(event["value"], None)
            if instance is not None:
                self._broken(instance)
