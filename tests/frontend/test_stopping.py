"""A server that is told to end: requests have ``--shutdown-timeout`` to finish, none are taken."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import pytest
from vllm.exceptions import GracefulHTTPError

from llumsched.frontend.routing.engine import Engine
from tests.frontend.engines import engine_that, send, taken


async def beginning_to_stop(engine: Engine, timeout_s: float) -> asyncio.Future[None]:
    """As vLLM's server has it done: on another thread, while the loop serves."""
    loop = asyncio.get_running_loop()
    engine.end_with(loop)
    return loop.run_in_executor(None, engine.shutdown, timeout_s)


def finish(engine: Engine, request_id: str) -> None:
    engine.output_processor.abort_requests([request_id], internal=True)


def test_requests_finish_within_the_timeout() -> None:
    async def scenario() -> None:
        engine = engine_that(taken)
        await send(engine, "r1")
        stopping = await beginning_to_stop(engine, 60.0)
        done, _ = await asyncio.wait({stopping}, timeout=0.2)
        assert not done, "a request is running"
        with pytest.raises(GracefulHTTPError, match="The server is stopping") as refused:
            await send(engine, "r2")
        assert refused.value.http_status == HTTPStatus.SERVICE_UNAVAILABLE
        finish(engine, "r1")
        async with asyncio.timeout(20):
            await stopping

    asyncio.run(scenario())


@pytest.mark.parametrize("timeout_s", [0.0, 0.1])
def test_what_is_not_finished_by_then_is_told_so(timeout_s: float) -> None:
    async def scenario() -> None:
        engine = engine_that(taken)
        outputs = await send(engine, "r1")
        stopping = await beginning_to_stop(engine, timeout_s)
        async with asyncio.timeout(20):
            await stopping
            with pytest.raises(GracefulHTTPError, match="The server is stopping"):
                await outputs.get()
        finish(engine, "r1")

    asyncio.run(scenario())
