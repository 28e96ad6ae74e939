"""Nothing stays in vLLM's frontend of requests that are rejected, or whose clients leave."""

from __future__ import annotations

import asyncio

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from llumsched.frontend.request.rejection import Rejected
from llumsched.frontend.routing.engine import Engine
from tests.frontend.engines import engine_that, held, raising, send


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


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_half_a_surrogate_pair_is_refused_by_the_name_of_its_parameter(name: str) -> None:
    """As the client's mistake, which vLLM answers with a 500."""

    async def scenario() -> None:
        engine = engine_that(held)
        params = SamplingParams()
        setattr(params, name, ["fine", "\ud800"])
        with pytest.raises(VLLMValidationError, match=f"{name}: .*lone surrogate") as refused:
            await engine.add_request("r1", {}, params)
        assert refused.value.parameter == name
        assert_empty(engine)

    asyncio.run(scenario())
