"""Heartbeats of all instances, heard by the launcher.

Only bytes are read here; what a silence means is decided in ``liveness``.
"""

from __future__ import annotations

import zmq

from llumsched.wire.keys import Gate, PoolKeys
from llumsched.wire.ping import BEAT_NUM_BYTES, decode_beat


class HeartbeatListener:
    """The launcher's end of all heartbeats; used by one thread."""

    def __init__(self, host: str, keys: PoolKeys) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self.gate = Gate(self._context, keys, [(self._socket, BEAT_NUM_BYTES)], "the supervisor")
        self._socket.bind(f"tcp://{host}:*")
        self.endpoint: str = self._socket.get_string(zmq.LAST_ENDPOINT)

    def heard(self) -> dict[int, float]:
        """Engine index of each instance that has beaten since the last call -> seconds for which
        its engine's loop had not answered at its last beat."""
        found = {}
        while self._socket.poll(0):
            beat = decode_beat(self._socket.recv())
            if beat is not None:
                engine_index, silent_s = beat
                found[engine_index] = silent_s
        return found

    def close(self) -> None:
        self.gate.close()
        self._socket.close(linger=0)
        self._context.term()
