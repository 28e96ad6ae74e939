"""The sockets of a frontend: two to its instances, as vLLM's engine core expects it, and how a
socket is served by the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import zmq
import zmq.asyncio
from vllm.config import VllmConfig
from vllm.v1.engine.utils import EngineZmqAddresses

from llumsched.wire.keys import MAX_CONTROL_NUM_BYTES, Gate, PoolKeys

# Of one logprob: a float, and the number of its token.
LOGPROB_NUM_BYTES = 8
# What an instance says of itself when it connects.
MAX_READY_NUM_BYTES = 1 << 20
# Taken in at a time; then it is others' turn.
MAX_MESSAGES_AT_ONCE = 64


class LoopSocket:
    """A socket on the running loop that needs neither a future nor a task for a message.

    ``zmq.asyncio`` makes a future for each message and wakes a task with it, which costs more than
    to take the message in. Here whatever has come is handed on in one go, as soon as the loop hears
    of it. Nobody else may receive from the socket, nor send while this does.

    Args:
        socket: a plain one, or the shadow of an asynchronous one that is not used otherwise.
        take_in: called with the frames of every message, in order. After an error of its own the
            next message follows all the same.
    """

    def __init__(
        self, socket: zmq.Socket[bytes], take_in: Callable[[list[zmq.Frame]], None]
    ) -> None:
        self._socket = socket
        self._take_in = take_in
        self._descriptor: int = socket.getsockopt(zmq.FD)  # type: ignore[assignment]
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Take in messages on the running loop from now on, those first that are there already."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, self.read)
        self._read_soon()

    def stop(self) -> None:
        """Take in nothing more; safe to call twice. Call before the socket is closed."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.remove_reader(self._descriptor)

    def send(self, payload: bytes) -> None:
        """Send a message.

        Raises:
            zmq.Again: as many as the socket may keep wait to be sent.
        """
        self._socket.send(payload, zmq.NOBLOCK)
        # The descriptor tells of a change once, and to send may have used that up.
        events: Any = self._socket.getsockopt(zmq.EVENTS)
        if events & zmq.POLLIN:
            self._read_soon()

    def read(self) -> None:
        """Take in what has come, without waiting until the loop hears of it."""
        for _ in range(MAX_MESSAGES_AT_ONCE):
            if self._loop is None:
                return
            try:
                frames: Any = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                self._take_in(frames)
            except BaseException:
                self._read_soon()
                raise
        self._read_soon()

    def _read_soon(self) -> None:
        if self._loop is not None:
            self._loop.call_soon(self.read)


class FrontendSockets:
    """The two sockets all instances connect to.

    Args:
        host: address to bind, loopback unless instances run on other machines.
        keys: the pool's.
        max_output_num_bytes: of one frame of an instance's outputs.
        ports: to listen at, for requests and for outputs; those that are 0 the system chooses.
    """

    def __init__(
        self,
        host: str,
        keys: PoolKeys,
        max_output_num_bytes: int,
        ports: tuple[int, int] = (0, 0),
    ) -> None:
        self.keys = keys
        self.sync_context = zmq.Context(io_threads=2)
        self.context = zmq.asyncio.Context(self.sync_context)
        self.input = self.context.socket(zmq.ROUTER)
        self.output = self.context.socket(zmq.PULL)
        limits = [(self.input, MAX_READY_NUM_BYTES), (self.output, max_output_num_bytes)]
        # They are monitored by ``BrokenConnections``.
        self.gate = Gate(self.context, keys, limits, "the frontend", monitors=False)
        for (socket, _), port in zip(limits, ports, strict=True):
            # vLLM's own have no limit either: requests and tokens are never dropped here.
            socket.set_hwm(0)
            socket.bind(f"tcp://{host}:{port}")

    def addresses(self) -> EngineZmqAddresses:
        return EngineZmqAddresses(
            inputs=[self.input.get_string(zmq.LAST_ENDPOINT)],
            outputs=[self.output.get_string(zmq.LAST_ENDPOINT)],
        )

    def close(self) -> None:
        self.gate.close()
        self.input.close(linger=0)
        self.output.close(linger=0)
        self.sync_context.term()


def max_output_num_bytes(config: VllmConfig) -> int:
    """The longest frame of outputs: the logprobs of a whole prompt, as many as may be asked for."""
    model = config.model_config
    num_logprobs = model.max_logprobs if model.max_logprobs >= 0 else model.get_vocab_size()
    return max(MAX_CONTROL_NUM_BYTES, model.max_model_len * (num_logprobs + 1) * LOGPROB_NUM_BYTES)


def engine_identity(engine_index: int) -> bytes:
    """The ZMQ identity vLLM gives the engine of this index."""
    return engine_index.to_bytes(2, "little")
