"""vLLM's frontend with its own output processor, and a client whose answers the test gives."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from llumsched.frontend.routing.engine import Engine
from tests.builders import engine_request

Add = Callable[[EngineCoreRequest], Awaitable[None]]


async def taken(_: EngineCoreRequest) -> None:
    pass


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


async def send(engine: Engine, request_id: str) -> RequestOutputCollector:
    """Send a request; its outputs."""
    request = engine_request(request_id, external_req_id="asked")
    queue = RequestOutputCollector(RequestOutputKind.DELTA, request_id)
    await engine._add_request(request, None, None, 0, queue)
    return queue
