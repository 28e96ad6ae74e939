"""What vLLM's frontend keeps of requests that are rejected, or whose clients leave: nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from llumsched.frontend.request.rejection import Rejected
from llumsched.frontend.routing.engine import Engine

Add = Callable[[EngineCoreRequest], Awaitable[None]]


async def held(_: EngineCoreRequest) -> None:
    await asyncio.Event().wait()


def raising(error: Exception) -> Add:
    async def add(_: EngineCoreRequest) -> None:
        await asyncio.sleep(0)
        raise error

    return add


def engine_that(adds: Add, max_num_queued_reqs: int | None = None) -> Engine:
    """An engine whose client takes requests like ``adds``, with vLLM's own output processor."""
    engine: Any = Engine.__new__(Engine)
    engine.engine_core = SimpleNamespace(add_request_async=adds, shutdown=lambda timeout: None)
    engine.output_processor = OutputProcessor(None, log_stats=True)
    engine.log_requests = False
    engine.logger_manager = engine.admission_stats = None
    engine.scheduler_config = SimpleNamespace(
        max_num_queued_reqs=max_num_queued_reqs, max_num_queued_tokens=None
    )
    found: Engine = engine
    return found


async def send(engine: Engine, request_id: str) -> None:
    request = EngineCoreRequest(
        request_id=request_id,
        external_req_id="asked",
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=5),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    queue = RequestOutputCollector(RequestOutputKind.DELTA, request_id)
    await engine._add_request(request, None, None, 0, queue)


def assert_empty(engine: Engine) -> None:
    processor = engine.output_processor
    assert not processor.request_states
    assert not processor.external_req_ids
    assert not processor.parent_requests
    assert engine.get_num_unfinished_requests() == 0


@pytest.mark.parametrize(
    "error",
    [Rejected("the queue is full", 1.0), ConnectionError("lost"), EngineDeadError()],
    ids=["rejected", "lost", "dead"],
)
def test_what_is_not_taken_is_forgotten(error: Exception) -> None:
    async def scenario() -> None:
        engine = engine_that(raising(error))
        for number in range(3):
            with pytest.raises(type(error)):
                await send(engine, f"r{number}")
        assert_empty(engine)

    asyncio.run(scenario())


def test_a_client_that_leaves_while_its_request_is_held_is_forgotten() -> None:
    async def scenario() -> None:
        engine = engine_that(held)
        sending = asyncio.create_task(send(engine, "r1"))
        await asyncio.sleep(0)
        assert engine.get_num_unfinished_requests() == 1
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert_empty(engine)

    asyncio.run(scenario())


def test_rejections_do_not_fill_the_queue_of_vllm() -> None:
    async def scenario() -> None:
        engine = engine_that(raising(Rejected("the pool is full", 1.0)), max_num_queued_reqs=2)
        for number in range(5):
            with pytest.raises(Rejected):
                await send(engine, f"r{number}")

    asyncio.run(scenario())
