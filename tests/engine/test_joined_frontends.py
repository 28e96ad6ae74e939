"""A frontend that joins an engine that runs: vLLM's own threads, over real sockets, on no model."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import zmq
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequestType
from vllm.v1.engine import core as engine_core_module
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.serial_utils import MsgpackDecoder

from llumsched.engine.vllm.joined_frontends import JoinedFrontends
from llumsched.engine.vllm.patches import prove_membership
from llumsched.engine.vllm.reconnect_probe import RECONNECT_PROBE
from llumsched.frontend.routing.sockets import FrontendSockets, engine_identity
from llumsched.wire.keys import PoolKeys

PATIENCE_S = 20.0
PATIENCE_MS = 20_000
KEYS = PoolKeys.generate()
INSTANCE = 3
# The engine was told of one frontend when it was built.
FIRST, JOINED, NEXT = 0, 1, 2


class Core(EngineCoreProc):
    """The queues of an engine core, and what it says of itself."""

    def __init__(self) -> None:
        self.engine_index = INSTANCE
        self.tensor_ipc_receiver = None
        self.input_queue: queue.Queue[Any] = queue.Queue()
        self.output_queue: Any = queue.Queue()
        self.aborts_queue: queue.Queue[Any] = queue.Queue()

    def _make_ready_response(self) -> Any:
        return {"hello": INSTANCE}


@pytest.fixture(autouse=True)
def _members(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = engine_core_module
    monkeypatch.setattr(module, "make_zmq_socket", module.make_zmq_socket)
    prove_membership(KEYS)


class Frontend:
    def __init__(self, joined: JoinedFrontends, index: int) -> None:
        self._sockets = FrontendSockets("127.0.0.1", KEYS, 1 << 20)
        self.input: zmq.Socket[bytes] = zmq.Socket.shadow(self._sockets.input)
        self.output: zmq.Socket[bytes] = zmq.Socket.shadow(self._sockets.output)
        self.index = index
        self._joined = joined

    def join(self) -> None:
        addresses = self._sockets.addresses()
        self._joined.connect(self.index, addresses.inputs[0], addresses.outputs[0])

    def heard(self) -> bytes:
        """The introduction of an instance."""
        assert self.input.poll(PATIENCE_MS)
        identity, said = self.input.recv_multipart()
        assert identity == engine_identity(INSTANCE)
        return said

    def ask(self, *request_ids: str) -> None:
        kind = EngineCoreRequestType.ABORT.value
        payload = msgspec.msgpack.encode(list(request_ids))
        self.input.send_multipart([engine_identity(INSTANCE), kind, payload])

    def told(self) -> str:
        """The request of the next output."""
        assert self.output.poll(PATIENCE_MS)
        frames = self.output.recv_multipart()
        decoded = MsgpackDecoder(EngineCoreOutputs).decode(frames)
        assert decoded.engine_index == INSTANCE
        return str(decoded.outputs[0].request_id)

    def close(self) -> None:
        self._sockets.close()


@pytest.fixture
def core() -> Core:
    make: Any = Core
    made: Core = make()
    return made


@pytest.fixture
def joined(core: Core) -> Iterator[JoinedFrontends]:
    joined = JoinedFrontends(core, 1)
    yield joined
    for index in (JOINED, NEXT):
        joined.disconnect(index)


@pytest.fixture
def frontend(joined: JoinedFrontends) -> Iterator[Frontend]:
    frontend = Frontend(joined, JOINED)
    frontend.join()
    yield frontend
    joined.disconnect(JOINED)
    frontend.close()


def output(client_index: int, request_id: str) -> tuple[int, EngineCoreOutputs]:
    one = EngineCoreOutput(request_id=request_id, new_token_ids=[1])
    return client_index, EngineCoreOutputs(outputs=[one])


def threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith(("take-", "give-"))}


def until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_its_requests_come_and_its_outputs_go(core: Core, frontend: Frontend) -> None:
    assert msgspec.msgpack.decode(frontend.heard()) == {"hello": INSTANCE}
    frontend.ask("a")
    assert core.input_queue.get(timeout=PATIENCE_S) == (EngineCoreRequestType.ABORT, ["a"])
    core.output_queue.put_nowait(output(JOINED, "mine"))
    core.output_queue.put_nowait(output(FIRST, "another's"))
    core.output_queue.put_nowait(output(JOINED, "mine too"))
    assert [frontend.told(), frontend.told()] == ["mine", "mine too"]
    # As before, vLLM's own thread has the rest.
    assert core.output_queue.get(timeout=PATIENCE_S)[0] == FIRST
    assert core.output_queue.empty()


def test_it_is_answered_when_it_greets(core: Core, frontend: Frontend) -> None:
    said = frontend.heard()
    frontend.input.send_multipart([engine_identity(INSTANCE), RECONNECT_PROBE])
    assert frontend.heard() == said


def test_to_join_twice_is_to_join_once(frontend: Frontend) -> None:
    before = threads()
    frontend.join()
    assert threads() == before == {"take-1", "give-1"}


def test_nothing_of_one_that_is_gone_is_taken_in(
    core: Core, joined: JoinedFrontends, frontend: Frontend
) -> None:
    frontend.heard()
    joined.disconnect(JOINED)
    until(lambda: not threads())
    frontend.ask("late")
    core.output_queue.put_nowait(output(JOINED, "for nobody"))
    other = Frontend(joined, NEXT)
    try:
        other.join()
        other.heard()
        other.ask("b")
        assert core.input_queue.get(timeout=PATIENCE_S) == (EngineCoreRequestType.ABORT, ["b"])
        core.output_queue.put_nowait(output(NEXT, "of the next"))
        assert other.told() == "of the next"
        assert not frontend.output.poll(0)
        assert core.output_queue.empty()
    finally:
        joined.disconnect(NEXT)
        other.close()


def test_one_that_never_came_can_go(joined: JoinedFrontends) -> None:
    """Nobody listens there any more."""
    joined.connect(JOINED, "tcp://127.0.0.1:1", "tcp://127.0.0.1:1")
    joined.disconnect(JOINED)
    until(lambda: not threads())


def test_all_hear_of_an_engine_that_died(core: Core, frontend: Frontend) -> None:
    frontend.heard()
    core.output_queue.put_nowait(EngineCoreProc.ENGINE_CORE_DEAD)
    assert frontend.output.poll(PATIENCE_MS)
    assert frontend.output.recv() == EngineCoreProc.ENGINE_CORE_DEAD
    assert core.output_queue.get(timeout=PATIENCE_S) == EngineCoreProc.ENGINE_CORE_DEAD


def test_a_request_that_cannot_be_built_is_one_client_s(core: Core, frontend: Frontend) -> None:
    """The error goes to the frontend that sent it."""
    frontend.heard()
    core._send_error_outputs_to_client(["broken"], frontend.index)
    assert frontend.told() == "broken"
