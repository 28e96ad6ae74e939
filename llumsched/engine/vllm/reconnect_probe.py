"""An engine says again who it is to a frontend that was started in the place of another.

vLLM's engine introduces itself once, to the frontends that it connects to. ZMQ connects it to a
frontend that listens at the same address later, but nobody there knows of it, nor which connection
is whose. Such a frontend greets the engines that it was told of, again and again; each answers by
what it said first. To vLLM's thread a greeting looks like the abort of no request.
"""

from __future__ import annotations

from typing import Any

import msgspec
import zmq
from vllm.v1.engine import EngineCoreRequestType

# No type of a request of vLLM's is as long.
RECONNECT_PROBE = b"who are you?"

_NOTHING = [EngineCoreRequestType.ABORT.value, msgspec.msgpack.encode([])]


class IntroducingSocket(zmq.Socket[bytes]):
    """The socket by which an engine takes requests; used by one thread."""

    _introduction: bytes | None = None

    def send(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        if self._introduction is None:
            self._introduction = bytes(data)
        return super().send(data, *args, **kwargs)

    def recv_multipart(self, *args: Any, **kwargs: Any) -> Any:
        frames = super().recv_multipart(*args, **kwargs)
        if bytes(frames[0]) != RECONNECT_PROBE:
            return frames
        if self._introduction is not None:
            super().send(self._introduction)
        return [zmq.Frame(frame) for frame in _NOTHING]
