"""The launcher's socket for frontends that it has not started: who may come in, and who is gone.

Invariant: a frontend that is taken for gone never comes back. What its connection says afterwards,
or one that ZMQ has made anew, is answered by that it is gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import zmq

from llumsched.frontend.workers.messages import JoinPool
from llumsched.frontend.workers.remote_channel import (
    BEAT,
    GONE,
    LINGER_MS,
    SILENT_S,
    Post,
    RemoteChannel,
)
from llumsched.wire.keys import MAX_CONTROL_NUM_BYTES, Gate, PoolKeys

_decode_join = msgspec.msgpack.Decoder(JoinPool).decode


class FrontDoor:
    """The launcher's socket for frontends that join.

    Args:
        host: address to listen at.
        keys: the pool's.
        admit: hears of a frontend that wants to join, on the thread of the door, with its channel.
    """

    def __init__(
        self, host: str, keys: PoolKeys, admit: Callable[[JoinPool, RemoteChannel], None]
    ) -> None:
        self._admit = admit
        self._channels: dict[bytes, RemoteChannel] = {}
        self._connections: dict[int, bytes] = {}
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        guarded = [(self._socket, MAX_CONTROL_NUM_BYTES)]
        self.gate = Gate(self._context, keys, guarded, "the launcher", monitors=False)
        self._socket.bind(f"tcp://{host}:*")
        self.endpoint: str = self._socket.get_string(zmq.LAST_ENDPOINT)
        self._post = Post("door", self._socket, self._take_in, self._beat, self._happened)
        self._post.start()

    def close(self) -> None:
        """Tell everybody that the launcher is gone."""
        for channel in list(self._channels.values()):
            channel.close()
        self._post.close()
        self.gate.close()
        self._socket.close(linger=LINGER_MS)
        self._context.term()

    def _take_in(self, frames: list[zmq.Frame]) -> None:
        identity, payload = frames[0].bytes, frames[-1].bytes
        channel = self._channels.get(identity)
        if channel is not None:
            if payload == GONE:
                self._forget(identity)
            else:
                channel.take_in(payload)
            return
        try:
            wish = _decode_join(payload)
        except msgspec.DecodeError:
            if payload != GONE:
                self._post.send(identity, GONE)
            return
        self._connections[frames[-1].get(zmq.SRCFD)] = identity
        channel = RemoteChannel(lambda said: self._post.send(identity, said))
        self._channels[identity] = channel
        self._admit(wish, channel)

    def _happened(self, event: Mapping[str, Any]) -> None:
        self.gate.count(event["event"])
        if event["event"] == zmq.EVENT_DISCONNECTED:
            identity = self._connections.pop(event["value"], None)
            if identity is not None:
                self._forget(identity)

    def _beat(self) -> None:
        silent_since_s = time.monotonic() - SILENT_S
        for identity, channel in list(self._channels.items()):
            if channel.is_closed or channel.heard_s < silent_since_s:
                self._forget(identity)
            else:
                self._post.send(identity, BEAT)

    def _forget(self, identity: bytes) -> None:
        channel = self._channels.pop(identity, None)
        if channel is not None:
            channel.close()
