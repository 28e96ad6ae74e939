"""Names of vLLM's modules that are replaced, where vLLM offers no parameter: all that there are.

Each is an entry of the lists of internals, so a release that moves one is refused at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import zmq
from vllm.v1.engine import async_llm as async_llm_module
from vllm.v1.engine import core as engine_core_module

from llumsched.engine.vllm.reconnect_probe import IntroducingSocket
from llumsched.wire.keys import PoolKeys

# Of one frame of a request: what a frontend has taken in by HTTP, images and all.
MAX_REQUEST_NUM_BYTES = 1 << 30


def prove_membership(keys: PoolKeys) -> None:
    """Have the engines of this process hold the pool's keys where they connect to a frontend, and
    answer its greetings.

    Replaces the function that an engine core's two threads open their sockets with.
    """
    module: Any = engine_core_module
    original = module.make_zmq_socket

    def make_zmq_socket(context: zmq.Context[Any], *args: Any, **kwargs: Any) -> Any:
        keys.connect_with(context, max_message_num_bytes=MAX_REQUEST_NUM_BYTES)
        opening: Any = context
        opening._socket_class = IntroducingSocket
        return original(context, *args, **kwargs)

    module.make_zmq_socket = make_zmq_socket


@contextmanager
def client_made_by(make_client: Callable[..., Any]) -> Iterator[None]:
    """While this lasts, ``AsyncLLM`` builds its client by ``make_client``.

    Replaces the class whose factory ``AsyncLLM`` calls.
    """
    module: Any = async_llm_module
    original = module.EngineCoreClient
    module.EngineCoreClient = type(
        "EngineCoreClient", (original,), {"make_async_mp_client": staticmethod(make_client)}
    )
    try:
        yield
    finally:
        module.EngineCoreClient = original
