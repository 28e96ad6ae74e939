"""Names of vLLM's modules that are replaced, where vLLM offers no parameter: all that there are.

Each is an entry of the lists of internals, so a release that moves one is refused at the start.
"""

from __future__ import annotations

import threading
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


class EndableThread(threading.Thread):
    """A thread in which vLLM opens a socket and waits for ever, and that others can end."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._opened = threading.Event()
        self._context: zmq.Context[Any] | None = None

    def opens(self, context: zmq.Context[Any]) -> None:
        """A socket is about to be opened in this context, which is the thread's own."""
        # Whoever ends the thread ends the context, and nobody may do so twice.
        owned: Any = context
        owned.__dict__["destroy"] = lambda: None
        self._context = context
        self._opened.set()

    def run(self) -> None:
        try:
            super().run()
        except zmq.ContextTerminated:
            pass  # it was ended
        finally:
            self._opened.set()

    def end(self) -> None:
        """Interrupt it, and wait until it has ended; for a thread that opens a socket."""
        self._opened.wait()
        if self._context is not None:
            self._context.term()
        self.join()


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
        thread = threading.current_thread()
        if isinstance(thread, EndableThread) and zmq.DEALER in args:
            thread.opens(context)
            kwargs["linger"] = 0
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
