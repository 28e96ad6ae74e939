"""The two sockets by which a frontend and its instances talk, as vLLM's engine core expects it."""

from __future__ import annotations

import zmq
import zmq.asyncio
from vllm.config import VllmConfig
from vllm.v1.engine.utils import EngineZmqAddresses

from llumsched.wire.keys import MAX_CONTROL_NUM_BYTES, Gate, PoolKeys

# Of one logprob: a float, and the number of its token.
LOGPROB_NUM_BYTES = 8
# What an instance says of itself when it connects.
MAX_READY_NUM_BYTES = 1 << 20


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
