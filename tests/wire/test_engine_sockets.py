"""The sockets that vLLM's engine opens by itself: they come in by the pool's keys, and only so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import zmq
from vllm.v1.engine import core as engine_core_module

from llumsched.engine.vllm.patches import prove_membership
from llumsched.frontend.routing.sockets import FrontendSockets, engine_identity
from llumsched.wire.keys import PoolKeys

PATIENCE_MS = 10_000
KEYS = PoolKeys.generate()


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = engine_core_module
    monkeypatch.setattr(module, "make_zmq_socket", module.make_zmq_socket)


@pytest.fixture
def sockets() -> Iterator[FrontendSockets]:
    sockets = FrontendSockets("127.0.0.1", KEYS, 1 << 20)
    yield sockets
    sockets.close()


def engine_socket(context: zmq.Context[Any], sockets: FrontendSockets) -> zmq.Socket[bytes]:
    """As ``EngineCoreProc.process_input_sockets`` opens it."""
    module: Any = engine_core_module
    opened: zmq.Socket[bytes] = module.make_zmq_socket(
        context,
        sockets.addresses().inputs[0],
        zmq.DEALER,
        identity=engine_identity(3),
        bind=False,
    )
    return opened


def test_an_engine_of_the_pool_is_heard_and_answered(sockets: FrontendSockets) -> None:
    prove_membership(KEYS)
    context = zmq.Context()
    engine = engine_socket(context, sockets)
    engine.send(b"ready")
    frontend: zmq.Socket[bytes] = zmq.Socket.shadow(sockets.input)
    assert frontend.poll(PATIENCE_MS)
    assert frontend.recv_multipart() == [engine_identity(3), b"ready"]
    frontend.send_multipart([engine_identity(3), bytes(1 << 20)])
    assert engine.poll(PATIENCE_MS)
    assert len(engine.recv()) == 1 << 20
    context.destroy(linger=0)


def test_an_engine_of_nobody_is_not(sockets: FrontendSockets) -> None:
    context = zmq.Context()
    monitor = sockets.input.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    # Held until the context ends: one that is collected waits for ever to get rid of its message.
    engine = engine_socket(context, sockets)
    with contextlib.suppress(zmq.Again):  # turned away already
        engine.send(b"ready", zmq.DONTWAIT)
    assert zmq.Socket.shadow(monitor).poll(PATIENCE_MS)
    sockets.input.disable_monitor()
    monitor.close(linger=0)
    assert not zmq.Socket.shadow(sockets.input).poll(0)
    context.destroy(linger=0)
