"""Signs of life: every instance sends one several times a second, from a thread of its own.

The thread does nothing else, so that it beats through a long step of the engine and a long
migration, and stops when the process hangs as a whole. A beat says whose it is, and for how long
the engine's loop has not answered. What follows from either is not decided here (``vital_signs``).
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable

import zmq

from llumsched.wire.keys import Gate, PoolKeys

INTERVAL_S = 0.1
# Engine index, and the silence of its loop in milliseconds.
_BEAT = struct.Struct("<HI")
BEAT_NUM_BYTES = _BEAT.size
_MAX_SILENCE_MS = 2**32 - 1


class HeartbeatListener:
    """Hears of all instances; used by one thread."""

    def __init__(self, host: str, keys: PoolKeys) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self.gate = Gate(self._context, keys, [(self._socket, BEAT_NUM_BYTES)], "the supervisor")
        self._socket.bind(f"tcp://{host}:*")
        self.endpoint: str = self._socket.get_string(zmq.LAST_ENDPOINT)

    def heard(self) -> dict[int, float]:
        """The engine indices of those that have beaten since the last call, and for how many
        seconds the loop of each had not answered at its last beat."""
        found = {}
        while self._socket.poll(0):
            beat = self._socket.recv()
            if len(beat) == _BEAT.size:
                engine_index, silence_ms = _BEAT.unpack(beat)
                found[engine_index] = silence_ms / 1000
        return found

    def close(self) -> None:
        self.gate.close()
        self._socket.close(linger=0)
        self._context.term()


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
        silence = Silence(ping_loop, interval_s=INTERVAL_S)
        pause = threading.Event()
        while not pause.wait(INTERVAL_S):
            silence.tick(INTERVAL_S)
            if socket.poll(0, zmq.POLLOUT):
                silence_ms = min(round(silence.silent_s * 1000), _MAX_SILENCE_MS)
                socket.send(_BEAT.pack(engine_index, silence_ms))

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()


class Silence:
    """Whether a process still answers pings: one is sent, and the next when it is answered.

    Args:
        ping: sends a ping; the returned function says whether it has been answered.
        interval_s: pause between an answer and the next ping.
    """

    def __init__(self, ping: Callable[[], Callable[[], bool]], *, interval_s: float) -> None:
        self._ping = ping
        self._interval_s = interval_s
        self._answered: Callable[[], bool] | None = None
        self._rested_s = interval_s
        self.silent_s = 0.0

    def tick(self, awake_s: float) -> None:
        """So much time has passed since the last call."""
        if self._answered is None:
            self._rested_s += awake_s
            if self._rested_s < self._interval_s:
                return
            self._answered = self._ping()
        elif self._answered():
            self._answered = None
            self._rested_s = self.silent_s = 0.0
        else:
            self.silent_s += awake_s
