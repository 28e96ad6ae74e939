"""Frontends that join while an engine runs, each with two threads of its own beside vLLM's.

vLLM's engine core is told once where its frontends listen, and serves them by two threads. A
frontend that comes later gets the same two, running vLLM's own functions: one takes its requests
into the queue that all share, one sends its outputs from a queue of its own. They end with it.

Invariant: once a frontend is disconnected, nothing of it is taken in any more, and what is meant
for it is dropped. This module does not know who says that a frontend has joined or gone.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

from llumsched.engine.vllm.patches import EndableThread


class _Gone(Exception):
    """The frontend is gone."""


class _OwnQueue(queue.Queue[Any]):
    """Outputs for one frontend, to vLLM's thread the whole queue of an engine core."""

    def get(self, *args: Any, **kwargs: Any) -> Any:
        output = super().get(*args, **kwargs)
        if isinstance(output, _Gone):
            raise output
        return output


class OutputQueue:
    """An engine core's queue of outputs, of which those for frontends that joined go elsewhere.

    Args:
        shared: the queue as vLLM has made it.
        num_frontends: those whose client indices are lower are served by vLLM's own thread.
    """

    def __init__(self, shared: queue.Queue[Any], num_frontends: int) -> None:
        self._shared = shared
        self._num_frontends = num_frontends
        self._own: dict[int, _OwnQueue] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shared, name)

    def open(self, client_index: int) -> _OwnQueue:
        """A queue for the outputs of this client, from now on."""
        own = self._own[client_index] = _OwnQueue()
        return own

    def close(self, client_index: int) -> None:
        """Whatever is put for this client from now on is dropped."""
        self._own.pop(client_index).put_nowait(_Gone())

    def put_nowait(self, output: Any) -> None:
        if isinstance(output, bytes):  # that the engine is dead
            for own in list(self._own.values()):
                own.put_nowait(output)
            self._shared.put_nowait(output)
            return
        client_index, outputs = output
        if client_index < self._num_frontends:
            self._shared.put_nowait(output)
        elif (found := self._own.get(client_index)) is not None:
            found.put_nowait((0, outputs))


class EngineCore(Protocol):
    """Parts of vLLM's ``EngineCoreProc`` that are used here."""

    engine_index: int
    output_queue: Any

    def process_input_sockets(
        self,
        input_addresses: list[str],
        coord_input_address: str | None,
        identity: bytes,
        ready_event: threading.Event,
    ) -> None: ...

    def process_output_sockets(
        self, output_paths: list[str], coord_output_path: str | None, engine_index: int
    ) -> None: ...


class _WithQueue:
    """An engine core, but for its queue of outputs."""

    def __init__(self, core: EngineCore, output_queue: _OwnQueue) -> None:
        self._core = core
        self.output_queue = output_queue

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)


class JoinedFrontends:
    """Frontends of one engine that came after it was built; its methods may be called from any
    thread.

    Args:
        core: built already; from now on its queue of outputs is an ``OutputQueue``.
        num_frontends: those that it was told of when it was built.
    """

    def __init__(self, core: EngineCore, num_frontends: int) -> None:
        self._core = core
        self._outputs = OutputQueue(core.output_queue, num_frontends)
        core.output_queue = self._outputs
        self._inputs: dict[int, EndableThread] = {}
        self._lock = threading.Lock()

    def connect(self, client_index: int, input_address: str, output_address: str) -> None:
        """Serve a frontend that listens at these two addresses; nothing if it is served already."""
        core, index = self._core, self._core.engine_index
        with self._lock:
            if client_index in self._inputs:
                return
            own: Any = _WithQueue(core, self._outputs.open(client_index))
            identity = index.to_bytes(length=2, byteorder="little")
            take: Any = core.process_input_sockets
            give: Any = type(core).process_output_sockets
            taking = self._inputs[client_index] = EndableThread(
                name=f"take-{client_index}",
                target=take,
                args=([input_address], None, identity, threading.Event()),
                daemon=True,
            )
            taking.start()
            threading.Thread(
                name=f"give-{client_index}",
                target=_until_gone,
                args=(give, own, [output_address], None, index),
                daemon=True,
            ).start()

    def disconnect(self, client_index: int) -> None:
        """Take in nothing more of a frontend that joined; nothing if it has not."""
        with self._lock:
            taking = self._inputs.pop(client_index, None)
            if taking is not None:
                taking.end()
                self._outputs.close(client_index)


def _until_gone(give: Callable[..., None], *arguments: Any) -> None:
    with contextlib.suppress(_Gone):
        give(*arguments)
