"""Signs of life on the wire: heartbeats of instances, and pings that a process answers.

A heartbeat names the engine that sends it and for how long the engine's loop has not answered. A
``PingTimer`` keeps one ping under way at a time. What follows from a silence is not decided here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

# Engine index, and the silence of its loop in milliseconds.
_BEAT = struct.Struct("<HI")
BEAT_NUM_BYTES = _BEAT.size
_MAX_SILENCE_MS = 2**32 - 1


def encode_beat(engine_index: int, silent_s: float) -> bytes:
    """A heartbeat of the engine with this index, whose loop has not answered for ``silent_s``."""
    return _BEAT.pack(engine_index, min(round(silent_s * 1000), _MAX_SILENCE_MS))


def decode_beat(beat: bytes) -> tuple[int, float] | None:
    """Engine index and silence in seconds; ``None`` where the bytes are no heartbeat."""
    if len(beat) != _BEAT.size:
        return None
    engine_index, silence_ms = _BEAT.unpack(beat)
    return engine_index, silence_ms / 1000


class PingTimer:
    """Times how long a process leaves a ping unanswered; one ping is under way at a time.

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
        """Count ``awake_s`` seconds that have passed since the last call."""
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
