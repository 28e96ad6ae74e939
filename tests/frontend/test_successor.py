"""A frontend in the place of one that died, over real sockets, with an engine played by hand."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import zmq
from prometheus_client import CollectorRegistry
from vllm.config import VllmConfig
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
    UtilityOutput,
)
from vllm.v1.engine import core as engine_core_module
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

from llumsched.engine.vllm.patches import prove_membership
from llumsched.frontend.routing.client import RoutingEngineClient
from llumsched.frontend.routing.request_metrics import FrontendMetrics
from llumsched.frontend.routing.sockets import FrontendSockets, engine_identity
from llumsched.frontend.workers.ports import FrontendPorts
from llumsched.wire.keys import PoolKeys
from tests.builders import engine_request

PATIENCE_S = 20.0
HOST = "127.0.0.1"
KEYS = PoolKeys.generate()
INSTANCE = 3
PLACE = 1


class Placer:
    """All requests go to the one instance."""

    def __init__(self) -> None:
        self.ended_ids: list[str] = []

    async def place(self, request: EngineCoreRequest, **_: Any) -> int:
        return INSTANCE

    def sent_elsewhere(self, request: EngineCoreRequest, instance: int) -> None:
        raise AssertionError("no engine is paused here")

    def ended(self, request_id: str, **_: Any) -> None:
        self.ended_ids.append(request_id)


class Roster:
    def labels(self) -> dict[int, int]:
        return {INSTANCE: 2}


class Engine:
    """The two sockets of vLLM's engine core, opened as it opens them.

    ``ready`` is what it says of itself; vLLM takes nothing for an engine with nothing to say.
    """

    def __init__(self, ports: FrontendPorts, ready: bytes = b"") -> None:
        addresses = ports.addresses()
        self._context = zmq.Context()
        module: Any = engine_core_module
        self.input: zmq.Socket[bytes] = module.make_zmq_socket(
            self._context,
            addresses.inputs[PLACE],
            zmq.DEALER,
            identity=engine_identity(INSTANCE),
            bind=False,
        )
        self.output: zmq.Socket[bytes] = module.make_zmq_socket(
            self._context, addresses.outputs[PLACE], zmq.PUSH, linger=0
        )
        self.input.send(ready)
        self._heard: queue.SimpleQueue[tuple[EngineCoreRequestType, Any]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        """As vLLM's input thread does; aborts of no request are nothing."""
        while not self._closing.is_set():
            if not self.input.poll(10):
                continue
            type_frame, *frames = self.input.recv_multipart(copy=False)
            request_type = EngineCoreRequestType(bytes(type_frame.buffer))
            is_add = request_type is EngineCoreRequestType.ADD
            decoder = MsgpackDecoder(EngineCoreRequest) if is_add else MsgpackDecoder()
            request = decoder.decode(frames)
            if request:
                self._heard.put((request_type, request))

    def say(self, outputs: EngineCoreOutputs) -> None:
        outputs.engine_index = INSTANCE
        self.output.send_multipart(MsgpackEncoder().encode(outputs))

    async def hear(self) -> tuple[EngineCoreRequestType, Any]:
        """The next request."""
        return await asyncio.to_thread(self._heard.get, timeout=PATIENCE_S)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._context.destroy(linger=0)


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> Iterator[FrontendPorts]:
    module: Any = engine_core_module
    monkeypatch.setattr(module, "make_zmq_socket", module.make_zmq_socket)
    prove_membership(KEYS)
    with FrontendPorts(HOST, PLACE + 1) as ports:
        yield ports


@asynccontextmanager
async def frontend(ports: FrontendPorts, placer: Placer) -> AsyncIterator[RoutingEngineClient]:
    """Nothing of it is left afterwards, as of a process that has ended."""
    sockets = FrontendSockets(HOST, KEYS, 1 << 20, ports.of(PLACE))
    config = SimpleNamespace(
        cache_config=SimpleNamespace(num_gpu_blocks=None, block_size=16),
        model_config=SimpleNamespace(max_model_len=4096),
        parallel_config=SimpleNamespace(_coord_store_port=None),
    )
    client = RoutingEngineClient(
        cast(VllmConfig, config),
        sockets=sockets,
        placer=placer,
        client_index=PLACE,
        client_count=PLACE + 1,
        roster=Roster(),
        num_labels=4,
        ready_timeout_s=PATIENCE_S,
        metrics=FrontendMetrics(CollectorRegistry()),
    )
    try:
        yield client
    finally:
        client.shutdown()
        await asyncio.gather(*client._tasks, return_exceptions=True)
        sockets.close()


def tokens(request_id: str, *token_ids: int) -> EngineCoreOutputs:
    output = EngineCoreOutput(request_id=request_id, new_token_ids=list(token_ids))
    return EngineCoreOutputs(outputs=[output])


def play(
    ports: FrontendPorts, scenario: Callable[[Engine], Awaitable[None]], ready: bytes = b""
) -> None:
    async def playing() -> None:
        engine = Engine(ports, ready)
        try:
            await scenario(engine)
        finally:
            engine.close()

    asyncio.run(playing())


def test_instances_are_known_to_it_though_they_came_before(ports: FrontendPorts) -> None:
    async def scenario(engine: Engine) -> None:
        for name in ("of the first", "of the second"):
            async with frontend(ports, Placer()) as client:
                assert client.labels.by_instance == {INSTANCE: 2}
                await client.add_request_async(engine_request(name))
                request_type, heard = await engine.hear()
                assert (request_type, heard.request_id) == (EngineCoreRequestType.ADD, name)
                assert heard.client_index == PLACE

    play(ports, scenario)


# What an engine of vLLM 0.33 says when it is up; those before it say less.
READY = {
    "max_model_len": 2048,
    "num_gpu_blocks": 100,
    "block_size": 64,
    "dp_stats_address": None,
    "dtype": "torch.bfloat16",
    "vllm_version": "0.33.0",
    "world_size": 1,
    "data_parallel_size": 1,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "decode_context_parallel_size": 1,
    "data_parallel_rank": 0,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "instance_id": "i",
    "supports_lora": False,
    "max_loras": 0,
    "effective_attention_block_size": 64,
    "coord_store_port": 0,
    "coordinator_input_address": "ipc://input",
    "coordinator_output_address": "ipc://output",
}


def test_what_an_engine_says_of_itself_is_taken_in(ports: FrontendPorts) -> None:
    """The size of its blocks, which it chooses when the model is loaded, and its coordinator."""

    async def scenario(engine: Engine) -> None:
        async with frontend(ports, Placer()) as client:
            await client.add_request_async(engine_request("r"))
            await engine.hear()
            cache = client.vllm_config.cache_config
            assert (cache.block_size, cache.num_gpu_blocks) == (64, 100)
            assert client.vllm_config.model_config.max_model_len == 2048
            # vLLM before 0.33 does not look at them.
            assert client.coordinator_input_address in (None, "ipc://input")
            assert client.coordinator_output_address in (None, "ipc://output")

    play(ports, scenario, ready=msgspec.msgpack.encode(READY))


def test_what_was_meant_for_the_one_before_is_not_taken_in(ports: FrontendPorts) -> None:
    async def scenario(engine: Engine) -> None:
        async with frontend(ports, Placer()) as client:
            engine.say(tokens("of the one before", 7))
            late = UtilityOutput(call_id=12345, result=UtilityResult(None))
            engine.say(EngineCoreOutputs(utility_output=late))
            await client.add_request_async(engine_request("mine"))
            await engine.hear()
            engine.say(tokens("mine", 8))
            async with asyncio.timeout(PATIENCE_S):
                outputs = await client.get_output_async()
            assert [(o.request_id, o.new_token_ids) for o in outputs.outputs] == [("mine", [8])]

    play(ports, scenario)


def test_whatever_it_finds_of_the_one_before_ends(ports: FrontendPorts) -> None:
    async def scenario(engine: Engine) -> None:
        placer = Placer()
        async with frontend(ports, placer) as client:
            beginning = asyncio.create_task(client.begin_anew())
            request_type, (index, call_id, method, args) = await engine.hear()
            assert request_type is EngineCoreRequestType.UTILITY
            assert (index, method, list(args)) == (PLACE, "abort_client", [PLACE])
            answer = UtilityOutput(call_id=call_id, result=UtilityResult(["a", "b"]))
            engine.say(EngineCoreOutputs(utility_output=answer))
            await beginning
            assert placer.ended_ids == ["a", "b"]

    play(ports, scenario)


def test_a_client_that_leaves_as_its_request_is_sent_leaves_nothing(ports: FrontendPorts) -> None:
    async def scenario(engine: Engine) -> None:
        placer = Placer()
        async with frontend(ports, placer) as client:
            send = client.add

            async def add_and_hang(instance: int, asked: EngineCoreRequest) -> None:
                await send(instance, asked)
                await asyncio.Event().wait()

            patched: Any = client
            patched.add = add_and_hang
            sending = asyncio.create_task(client.add_request_async(engine_request("left")))
            request_type, _ = await engine.hear()
            assert request_type is EngineCoreRequestType.ADD
            sending.cancel()
            await asyncio.wait({sending})
            assert sending.cancelled()
            assert await engine.hear() == (EngineCoreRequestType.ABORT, ["left"])
            assert len(client.routes) == 0
            assert placer.ended_ids == ["left"]

    play(ports, scenario)
