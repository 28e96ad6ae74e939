"""vLLM's ``AsyncLLM`` over the instances of a pool.

``AsyncLLM`` builds its client itself, by a name that is replaced while it does; everything else of
it is as ever. This module does not know who started the instances, nor what is served by HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.tasks import SupportedTask
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from llumsched.engine.vllm.patches import client_made_by
from llumsched.frontend.options.preflight import TASKS_UNASKED
from llumsched.frontend.request import rejection
from llumsched.frontend.request.answerable import refuse_what_has_no_answer
from llumsched.frontend.routing.client import RoutingEngineClient
from llumsched.frontend.routing.connections import NoInstance, Roster
from llumsched.frontend.routing.request_metrics import FrontendMetrics
from llumsched.frontend.routing.scheduler_client import SchedulerClient
from llumsched.frontend.routing.sockets import FrontendSockets
from llumsched.wire.names import frontend_id

# How often a server that stops looks whether its last request has ended.
DRAIN_POLL_S = 0.05

PrefixHasher = Callable[[EngineCoreRequest], tuple[int, ...]]


class Engine(AsyncLLM):
    """vLLM's frontend; its requests end when it does, and it serves also while nothing is up."""

    engine_core: RoutingEngineClient
    _loop: asyncio.AbstractEventLoop | None = None
    _is_stopping = False

    async def get_supported_tasks(self) -> tuple[SupportedTask, ...]:
        try:
            return await super().get_supported_tasks()
        except NoInstance:
            return TASKS_UNASKED

    async def add_request(
        self, request_id: str, prompt: Any, params: Any, *arguments: Any, **options: Any
    ) -> RequestOutputCollector:
        try:
            _refuse_what_is_no_text(params)
            queue: RequestOutputCollector = await super().add_request(
                request_id, prompt, params, *arguments, **options
            )
        except VLLMValidationError as mistake:
            rejection.refused(mistake)
            raise
        return queue

    async def _add_request(
        self,
        request: EngineCoreRequest,
        prompt: str | None,
        parent_req: ParentRequest | None,
        index: int,
        queue: RequestOutputCollector,
    ) -> None:
        if index == 0 and request.sampling_params is not None:
            refuse_what_has_no_answer(request.sampling_params.structured_outputs)
        try:
            await super()._add_request(request, prompt, parent_req, index, queue)
        except BaseException:
            # AsyncLLM has registered it and forgets it on its last output, which never comes.
            self.output_processor.abort_requests([request.request_id], internal=True)
            raise

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        if self._is_stopping:
            raise _stopping()
        super().check_admission(n, request_id)

    def end_with(self, loop: asyncio.AbstractEventLoop) -> None:
        """Requests are served on ``loop``, also while another thread waits for their end."""
        self._loop = loop

    def shutdown(self, timeout: float | None = None) -> None:
        """Take no more requests; end those that there are when ``timeout`` has passed.

        vLLM's server calls this on a thread of its own, with ``--shutdown-timeout``, and goes on
        to send what comes meanwhile. The rest is for the last call, on the loop.
        """
        self._is_stopping = True
        loop = self._loop
        if loop is None or loop.is_closed() or _is_running_on(loop):
            self._end_requests()
            super().shutdown(timeout)
            return
        deadline_s = time.monotonic() + (timeout or 0.0)
        while self.get_num_unfinished_requests() and time.monotonic() < deadline_s:
            time.sleep(DRAIN_POLL_S)
        loop.call_soon_threadsafe(self._end_requests)

    def _end_requests(self) -> None:
        # AsyncLLM leaves them waiting for outputs, and their clients for the connection to break.
        self.output_processor.propagate_error(_stopping())


def _refuse_what_is_no_text(params: Any) -> None:
    """Refuse half of a surrogate pair, which JSON can name and nothing can encode.

    Raises:
        VLLMValidationError: a 400 that names the parameter; vLLM's own answer is a 500.
    """
    for name in ("stop", "bad_words"):
        for text in getattr(params, name, None) or ():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise VLLMValidationError(
                    f"{name}: {text!r} holds a lone surrogate, which is no character",
                    parameter=name,
                ) from None


def _stopping() -> GracefulHTTPError:
    return GracefulHTTPError("The server is stopping.", HTTPStatus.SERVICE_UNAVAILABLE)


def _is_running_on(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineClientConfig:
    """Where a frontend finds instances and scheduler.

    ``roster`` says which instances there are. ``client_index`` is the frontend's place among
    ``client_count`` frontends of the same instances. ``policy`` is the bundle in force.
    """

    sockets: FrontendSockets
    scheduler_endpoint: str
    prefix_hashes: PrefixHasher | None
    num_labels: int
    roster: Roster
    policy: str = ""
    client_index: int = 0
    client_count: int = 1

    @property
    def frontend_id(self) -> str:
        """By which the scheduler knows it."""
        return frontend_id(self.client_index)


def build_engine(
    args: argparse.Namespace, vllm_config: VllmConfig, surroundings: EngineClientConfig
) -> tuple[Engine, SchedulerClient]:
    """An engine whose instances have all reported, and its link to the scheduler.

    Raises:
        TimeoutError: if an instance does not report in time.
    """
    links: list[SchedulerClient] = []
    with client_made_by(_client_maker(surroundings, links)):
        engine = Engine.from_vllm_config(
            vllm_config=vllm_config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=args.enable_log_requests,
            aggregate_engine_logging=args.aggregate_engine_logging,
            disable_log_stats=args.disable_log_stats,
            client_count=surroundings.client_count,
            client_index=surroundings.client_index,
        )
    engine = cast(Engine, engine)
    engine.end_with(asyncio.get_running_loop())
    return engine, links[0]


def _client_maker(
    surroundings: EngineClientConfig, links: list[SchedulerClient]
) -> Callable[..., RoutingEngineClient]:
    """A factory of clients over the pool, each with a link to the scheduler, put into ``links``."""

    def make_client(
        vllm_config: VllmConfig, *_: Any, renderer: Any = None, **__: Any
    ) -> RoutingEngineClient:
        client: RoutingEngineClient | None = None

        def least_loaded() -> int | None:
            assert client is not None
            return client.least_loaded()

        link = SchedulerClient(
            surroundings.scheduler_endpoint,
            surroundings.sockets.keys,
            least_loaded,
            surroundings.prefix_hashes,
            surroundings.frontend_id,
        )
        links.append(link)
        metrics: FrontendMetrics | None = None
        if vllm_config.observability_config.otlp_traces_endpoint is not None:
            # OpenTelemetry is imported by whoever wants it; its provider is vLLM's.
            from llumsched.frontend.routing.tracing import TracedMetrics

            metrics = TracedMetrics(surroundings.policy, link.trace)
        client = RoutingEngineClient(
            vllm_config,
            sockets=surroundings.sockets,
            placer=link,
            renderer=renderer,
            client_index=surroundings.client_index,
            client_count=surroundings.client_count,
            roster=surroundings.roster,
            num_labels=surroundings.num_labels,
            metrics=metrics,
        )
        return client

    return make_client
