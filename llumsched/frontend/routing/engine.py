"""vLLM's ``AsyncLLM`` over the instances of a pool.

``AsyncLLM`` builds its client itself, by a name that is replaced while it does; everything else of
it is as ever. This module does not know who started the instances, nor what is served by HTTP.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError
from vllm.tasks import SupportedTask
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine import async_llm as async_llm_module
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from llumsched.frontend.options.preflight import TASKS_UNASKED
from llumsched.frontend.routing.client import RoutingEngineClient
from llumsched.frontend.routing.connections import NoInstance, Roster
from llumsched.frontend.routing.scheduler_client import SchedulerClient
from llumsched.frontend.routing.sockets import FrontendSockets
from llumsched.wire.names import frontend_id

PrefixHasher = Callable[[EngineCoreRequest], tuple[int, ...]]


class Engine(AsyncLLM):
    """vLLM's frontend; its requests end when it does, and it serves also while nothing is up."""

    engine_core: RoutingEngineClient

    async def get_supported_tasks(self) -> tuple[SupportedTask, ...]:
        try:
            return await super().get_supported_tasks()
        except NoInstance:
            return TASKS_UNASKED

    async def _add_request(
        self,
        request: EngineCoreRequest,
        prompt: str | None,
        parent_req: ParentRequest | None,
        index: int,
        queue: RequestOutputCollector,
    ) -> None:
        try:
            await super()._add_request(request, prompt, parent_req, index, queue)
        except BaseException:
            # AsyncLLM has registered it and forgets it on its last output, which never comes.
            self.output_processor.abort_requests([request.request_id], internal=True)
            raise

    def shutdown(self, timeout: float | None = None) -> None:
        # AsyncLLM leaves them waiting for outputs, and their clients for the connection to break.
        stopping = GracefulHTTPError("The server is stopping.", HTTPStatus.SERVICE_UNAVAILABLE)
        self.output_processor.propagate_error(stopping)
        super().shutdown(timeout)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineClientConfig:
    """Where a frontend finds instances and scheduler.

    ``roster`` says which instances there are. ``client_index`` is the frontend's place among
    ``client_count`` frontends of the same instances.
    """

    sockets: FrontendSockets
    scheduler_endpoint: str
    prefix_hashes: PrefixHasher | None
    num_labels: int
    roster: Roster
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
    with _our_client(surroundings, links):
        engine = Engine.from_vllm_config(
            vllm_config=vllm_config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=args.enable_log_requests,
            aggregate_engine_logging=args.aggregate_engine_logging,
            disable_log_stats=args.disable_log_stats,
            client_count=surroundings.client_count,
            client_index=surroundings.client_index,
        )
    return cast(Engine, engine), links[0]


@contextlib.contextmanager
def _our_client(surroundings: EngineClientConfig, links: list[SchedulerClient]) -> Iterator[None]:
    """While this lasts, ``AsyncLLM`` builds its client as one over the pool.

    ``AsyncLLM`` offers no parameter for its client, so the name it looks up is replaced.
    """

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
        client = RoutingEngineClient(
            vllm_config,
            sockets=surroundings.sockets,
            placer=link,
            renderer=renderer,
            client_index=surroundings.client_index,
            client_count=surroundings.client_count,
            roster=surroundings.roster,
            num_labels=surroundings.num_labels,
        )
        return client

    module: Any = async_llm_module
    original = module.EngineCoreClient
    replacement = type(
        "EngineCoreClient", (original,), {"make_async_mp_client": staticmethod(make_client)}
    )
    module.EngineCoreClient = replacement
    try:
        yield
    finally:
        module.EngineCoreClient = original
