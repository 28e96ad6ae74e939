"""Heartbeats of an instance: two a second, from a thread of its own.

The thread does nothing else, so that it beats through a long step of the engine and a long
migration, and stops when the process hangs as a whole. What follows from a missing beat is decided
by the launcher (``pool.liveness``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import zmq

from llumsched.wire.keys import PoolKeys
from llumsched.wire.ping import PingTimer, encode_beat

INTERVAL_S = 0.5


def start_beating(
    endpoint: str, engine_index: int, keys: PoolKeys, ping_loop: Callable[[], Callable[[], bool]]
) -> None:
    """Beat until the process ends.

    Args:
        ping_loop: asks something of the engine's loop; the returned function says whether it has
            been answered.
    """

    def beat() -> None:
        context = zmq.Context()
        socket = context.socket(zmq.PUSH)
        socket.linger = 0
        socket.set_hwm(1)  # a listener that was away has no use for old ones
        keys.connect_with(socket)
        socket.connect(endpoint)
        silence = PingTimer(ping_loop, interval_s=INTERVAL_S)
        pause = threading.Event()
        while not pause.wait(INTERVAL_S):
            silence.tick(INTERVAL_S)
            if socket.poll(0, zmq.POLLOUT):
                socket.send(encode_beat(engine_index, silence.silent_s))

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()
