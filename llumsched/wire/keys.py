"""Keys of a pool: only a process that holds them may talk to the others.

A pool makes keys when it starts, and Ray hands them to its processes. Every socket between them is
a ZeroMQ CURVE socket: both ends prove that they hold the keys before a message is taken in, and
what they say is encrypted. Without the keys there is no connection, not a weaker one.

Invariant: nothing that a stranger sends reaches a decoder, and none of it is kept: its length is
checked before memory is taken, and a connection has ``HANDSHAKE_TIMEOUT_S`` to prove itself.

What this does not know: which process may say what. All members of a pool trust each other.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils.monitor import recv_monitor_message

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0
# No message but those of the engines and those with KV blocks comes near; one that is longer ends
# its connection.
MAX_CONTROL_NUM_BYTES = 16 << 20
COUNTED_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
# What CURVE adds to a frame, generously.
_OVERHEAD_NUM_BYTES = 1 << 10
_DOMAIN = "llumsched"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolKeys:
    """The keys of one pool, in Z85. Two pairs, of whoever binds a socket and of whoever connects to
    it, so that what one end says cannot be played back to it as the other's."""

    binding_public: bytes
    binding_secret: bytes = field(repr=False)
    connecting_public: bytes
    connecting_secret: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> PoolKeys:
        """New keys, from the system's random numbers."""
        binding, connecting = zmq.curve_keypair(), zmq.curve_keypair()
        return cls(
            binding_public=binding[0],
            binding_secret=binding[1],
            connecting_public=connecting[0],
            connecting_secret=connecting[1],
        )

    def connect_with(
        self,
        socket: zmq.Socket[Any] | zmq.Context[Any],
        max_message_num_bytes: int = MAX_CONTROL_NUM_BYTES,
    ) -> None:
        """Have a socket, or every new socket of a context, prove itself where it connects to.

        Call before it connects. ``max_message_num_bytes`` is for each frame that it receives.
        """
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.binding_public)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.connecting_public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.connecting_secret)
        socket.setsockopt(zmq.MAXMSGSIZE, max_message_num_bytes + _OVERHEAD_NUM_BYTES)


class Gate:
    """Before the sockets that one context binds: lets members in, and counts everybody else.

    Args:
        sockets: not bound yet, each with the most bytes that a frame to it may have.
        name: of the process, for the log.
        monitors: whether to count by itself. A socket has one monitor: whoever needs that passes
            its ``COUNTED_EVENTS`` on to ``count``.

    One thread answers who may come in. Close the gate before its sockets.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        keys: PoolKeys,
        sockets: Sequence[tuple[zmq.Socket[Any], int]],
        name: str,
        *,
        monitors: bool = True,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
    ) -> None:
        self._handshake_timeout_s = handshake_timeout_s
        self._context = context
        self._keys = keys
        self._name = name
        self._num_accepted = 0
        self._num_proven = 0
        self._num_told = 0
        self._monitored = [socket for socket, _ in sockets] if monitors else []
        for socket, max_message_num_bytes in sockets:
            self._guard(socket, max_message_num_bytes)
        self._monitors = [self._monitor(socket) for socket in self._monitored]
        self._stopping = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gate", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._loop is None:
            raise RuntimeError("a context can have one gate")

    @property
    def num_unauthenticated(self) -> int:
        """Connections that have not proved to be a member's since the start; one that is just being
        made is among them until it has."""
        return max(0, self._num_accepted - self._num_proven)

    def count(self, event: int) -> None:
        """Something has become of a connection: one of ``COUNTED_EVENTS``."""
        match event:
            case zmq.EVENT_ACCEPTED:
                self._num_accepted += 1
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._num_proven += 1
            case zmq.EVENT_DISCONNECTED if self.num_unauthenticated >= max(1, 2 * self._num_told):
                # Told less and less often, for whoever knocks may do so for ever.
                self._num_told = self.num_unauthenticated
                logger.warning(
                    "%s has turned away %d connections that did not hold the pool's keys",
                    self._name,
                    self._num_told,
                )

    def callback(self, _domain: str, public_key: bytes) -> bool:
        """True if the holder of this key is a member; called by pyzmq's authenticator."""
        return public_key == self._keys.connecting_public

    def close(self) -> None:
        """Let nobody in any more; safe to call twice."""
        if self._loop is None or not self._thread.is_alive():
            return
        for socket in self._monitored:
            # Else it would wait for somebody to read of its end.
            socket.disable_monitor()
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _guard(self, socket: zmq.Socket[Any], max_message_num_bytes: int) -> None:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.binding_public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.binding_secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN.encode())
        # Without the gate's thread nobody comes in, rather than everybody.
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.setsockopt(zmq.HANDSHAKE_IVL, int(1000 * self._handshake_timeout_s))
        socket.setsockopt(zmq.MAXMSGSIZE, max_message_num_bytes + _OVERHEAD_NUM_BYTES)

    def _monitor(self, socket: zmq.Socket[Any]) -> zmq.Socket[Any]:
        address = f"inproc://gate-{uuid.uuid4()}"
        socket.monitor(address, COUNTED_EVENTS)
        monitor: zmq.Socket[Any] = self._context.socket(zmq.PAIR, socket_class=zmq.Socket)
        monitor.connect(address)
        return monitor

    def _run(self) -> None:
        try:
            asyncio.run(self._watch())
        finally:
            self._started.set()

    async def _watch(self) -> None:
        authenticator = AsyncioAuthenticator(self._context)
        authenticator.configure_curve_callback(_DOMAIN, self)
        authenticator.start()
        self._loop = asyncio.get_running_loop()
        counting = [asyncio.create_task(self._follow(monitor)) for monitor in self._monitors]
        self._started.set()
        await self._stopping.wait()
        for task in counting:
            task.cancel()
        await asyncio.gather(*counting, return_exceptions=True)
        authenticator.stop()
        for monitor in self._monitors:
            monitor.close(linger=0)

    async def _follow(self, monitor: zmq.Socket[Any]) -> None:
        events: zmq.asyncio.Socket = zmq.asyncio.Socket.shadow(monitor)
        while True:
            self.count((await recv_monitor_message(events))["event"])
