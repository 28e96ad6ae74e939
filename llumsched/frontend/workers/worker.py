"""A frontend: vLLM's ``AsyncLLM`` and app, over instances that it did not start."""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import socket
from collections.abc import MutableSequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from prometheus_client.multiprocess import MultiProcessCollector
from vllm.config import VllmConfig
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.system_utils import decorate_logs
from vllm.v1.metrics.prometheus import get_prometheus_registry

from llumsched.engine.vllm.prefix_blocks import prefix_hasher
from llumsched.frontend.http.admin import admin_router, all_requests
from llumsched.frontend.http.app import serve_app
from llumsched.frontend.http.live import DESCRIBE_TIMEOUT_S, LiveFeed
from llumsched.frontend.http.pool_metrics import PoolMetrics
from llumsched.frontend.options.arguments import ServeOptions
from llumsched.frontend.options.preflight import check_tasks
from llumsched.frontend.routing.engine import EngineClientConfig, build_engine
from llumsched.frontend.routing.instance_events import InstanceEventBridge
from llumsched.frontend.routing.sockets import FrontendSockets, max_output_num_bytes
from llumsched.frontend.workers.channel import METRICS_FOLDER
from llumsched.frontend.workers.launcher_client import LauncherClient
from llumsched.logs import set_up
from llumsched.wire.keys import PoolKeys
from llumsched.wire.names import frontend_id

# A number of connections is an int of four bytes.
LOAD_NUM_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendPlan:
    """Everything that frontends are told; of each it is the same but for its place.

    ``ports`` are those of every place. ``listener`` and ``loads`` are file descriptors that they
    inherit: the socket that all of them take connections from, and how many each of them has.
    ``metrics_folder`` is where scheduler and frontends count, if that is on this machine.
    """

    args: argparse.Namespace
    options: ServeOptions
    vllm_config: VllmConfig
    keys: PoolKeys
    host: str
    ports: tuple[tuple[int, int], ...]
    scheduler_endpoint: str
    listen_address: str
    listener: int
    loads: int
    metrics_folder: Path | None


def connections_of_all(descriptor: int, num_frontends: int) -> MutableSequence[int]:
    """How many connections each frontend has, in memory that all of them share."""
    shared = memoryview(mmap.mmap(descriptor, LOAD_NUM_BYTES * num_frontends))
    return cast("MutableSequence[int]", shared.cast("i"))


async def serve(
    plan: FrontendPlan,
    index: int,
    supervision: LauncherClient,
    sockets: FrontendSockets | None = None,
) -> None:
    """Serve in this place until a signal, or the end of the launcher, ends it.

    Args:
        sockets: those that instances were told of, if they are not at the plan's ports.
    """
    name = frontend_id(index)
    set_up(name, plan.options.logs)
    decorate_logs(name)
    args, vllm_config = plan.args, plan.vllm_config
    if not supervision.labels():
        check_tasks(vllm_config)
    vllm_config.parallel_config._api_process_rank = index
    _import_plugins(args)
    if sockets is None:
        sockets = FrontendSockets(
            plan.host, plan.keys, max_output_num_bytes(vllm_config), plan.ports[index]
        )
    engine, link = build_engine(
        args,
        vllm_config,
        EngineClientConfig(
            sockets=sockets,
            scheduler_endpoint=plan.scheduler_endpoint,
            prefix_hashes=prefix_hasher(vllm_config) if plan.options.wants_prefix_blocks else None,
            num_labels=plan.options.most_instances,
            roster=supervision,
            policy=plan.options.config.policy,
            client_index=index,
            client_count=plan.options.num_frontends,
        ),
    )
    client = engine.engine_core
    registry = get_prometheus_registry()
    if METRICS_FOLDER not in os.environ and plan.metrics_folder is not None:
        # Of several frontends, each shows what is in the folder; this one shows the scheduler's.
        MultiProcessCollector(registry, path=str(plan.metrics_folder))  # type: ignore[no-untyped-call]
    metrics = PoolMetrics(supervision.unproven, client.labels, registry)
    following = [
        asyncio.create_task(metrics.follow(link)),
        asyncio.create_task(supervision.count(sockets.gate)),
    ]
    try:
        supervision.follow(client, InstanceEventBridge(asyncio.get_running_loop(), client, link))
        if client.instances:
            await client.begin_anew()
            await engine.reset_mm_cache()
        closing = await serve_app(
            args,
            engine,
            admin_router(
                link,
                client.routes,
                supervision,
                supervision,
                name,
                plan.options.config_file,
                LiveFeed(
                    lambda: link.describe(DESCRIBE_TIMEOUT_S),
                    lambda: all_requests(client.routes, name, supervision),
                    supervision.describe,
                    lambda: vllm_config.cache_config.block_size,
                    registry,
                ),
            )
            if plan.options.admin_api
            else None,
            registry,
            plan.listen_address,
            socket.socket(fileno=plan.listener),
            begins=supervision.serves,
            policy=plan.options.config.policy,
            # Alone, a frontend need not ask whose turn it is.
            peer_loads=(connections_of_all(plan.loads, plan.options.num_frontends), index)
            if plan.options.num_frontends > 1
            else None,
        )
        await closing
    finally:
        engine.shutdown(timeout=0)
        for task in following:
            task.cancel()
        link.close()


def _import_plugins(args: argparse.Namespace) -> None:
    """Import the plug-ins that vLLM imported into the launcher when it checked the arguments."""
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
