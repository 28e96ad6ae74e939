"""The two sockets by which a frontend and its instances talk, as vLLM's engine core expects it."""

from __future__ import annotations

from typing import cast

import zmq
import zmq.asyncio
from vllm.utils.network_utils import make_zmq_socket
from vllm.v1.engine.utils import EngineZmqAddresses


class FrontendSockets:
    """The two sockets all instances connect to; bound before any instance starts.

    Args:
        host: address to bind, loopback unless instances run on other machines.
    """

    def __init__(self, host: str) -> None:
        self.sync_context = zmq.Context(io_threads=2)
        self.context = zmq.asyncio.Context(self.sync_context)
        # A port of 0 is chosen by the system.
        self.input = self._bind(f"tcp://{host}:0", zmq.ROUTER)
        self.output = self._bind(f"tcp://{host}:0", zmq.PULL)

    def _bind(self, path: str, socket_type: int) -> zmq.asyncio.Socket:
        return cast(
            "zmq.asyncio.Socket", make_zmq_socket(self.context, path, socket_type, bind=True)
        )

    def addresses(self) -> EngineZmqAddresses:
        return EngineZmqAddresses(
            inputs=[self.input.get_string(zmq.LAST_ENDPOINT)],
            outputs=[self.output.get_string(zmq.LAST_ENDPOINT)],
        )

    def close(self) -> None:
        self.input.close(linger=0)
        self.output.close(linger=0)
        self.sync_context.term()


def engine_identity(engine_index: int) -> bytes:
    """The ZMQ identity vLLM gives the engine of this index."""
    return engine_index.to_bytes(2, "little")
