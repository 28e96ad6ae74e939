"""``llumsched serve``: vLLM's own OpenAI server over a pool of instances.

The order matters: whatever can be found wrong is found before anything is started; the port is
bound first, as vLLM does it; then the pool; then vLLM's ``AsyncLLM`` and app on top of it, in this
process, or in several others (``launcher``). Whatever was started ends with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence

import uvloop
import vllm.envs as envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.metrics.prometheus import get_prometheus_registry

from llumsched.engine.vllm.prefix_blocks import prefix_hasher, record_kv_events
from llumsched.frontend.http.admin import admin_router
from llumsched.frontend.http.app import serve_app
from llumsched.frontend.http.pool_metrics import PoolMetrics
from llumsched.frontend.options.arguments import ServeOptions, UsageError, parse
from llumsched.frontend.options.console import PROCESS, interrupt, on_signals, progress
from llumsched.frontend.options.instance_plan import limits_of, planner, resources_of
from llumsched.frontend.options.preflight import (
    check_model,
    check_prefix_hashes,
    check_serialization,
    check_several_frontends,
    check_tasks,
    plan_cpu_memory,
)
from llumsched.frontend.routing.engine import Surroundings, build_engine
from llumsched.frontend.routing.instance_events import Departures
from llumsched.frontend.routing.sockets import FrontendSockets, max_output_num_bytes
from llumsched.frontend.workers import launcher
from llumsched.logs import set_up
from llumsched.pool.pool import Pool
from llumsched.pool.ray_cluster import LaunchError
from llumsched.wire.keys import PoolKeys
from llumsched.wire.names import instance_name


def main(argv: Sequence[str]) -> int:
    """Run the server until it is told to stop; the process's exit status."""
    try:
        args, options = parse(argv)
        set_up(PROCESS, options.logs)
        check_model(args.model)
        check_several_frontends(options.num_frontends)
        vllm_config = _engine_config(args, options.num_frontends)
        check_serialization()
        if not options.num_instances:
            check_tasks(vllm_config)
        if options.wants_prefix_blocks:
            check_prefix_hashes(vllm_config, os.environ)
            record_kv_events(vllm_config)
        if current_platform.is_cpu():
            kv_bytes = plan_cpu_memory(vllm_config, options.planned_instances, os.environ)
            if kv_bytes is not None:
                vllm_config.cache_config.kv_cache_memory_bytes = kv_bytes
        listen_address, sock = _bind(args)
    except UsageError as error:
        sys.stderr.write(f"llumsched serve: {error}\n")
        return 2
    try:
        serve = launcher.serve if options.num_frontends > 1 else _serve
        return uvloop.run(serve(args, options, vllm_config, listen_address, sock))
    except LaunchError as error:
        sys.stderr.write(f"llumsched serve: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        sock.close()


def _engine_config(args: argparse.Namespace, num_frontends: int) -> VllmConfig:
    # The engine runs in the instance's own process, where the migrator reaches its KV cache.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        engine_args = AsyncEngineArgs.from_cli_args(args)
        if num_frontends > 1:
            # As vLLM does it: then no frontend relies on an instance to have kept an input of its.
            engine_args._api_process_count = num_frontends
            engine_args._api_process_rank = -1
        config: VllmConfig = engine_args.create_engine_config(
            usage_context=UsageContext.OPENAI_API_SERVER
        )
    except (OSError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = " ".join(lines[:3]) if lines else type(error).__name__
        raise UsageError(f"{args.model} cannot be served: {message}") from error
    return config


def _bind(args: argparse.Namespace) -> tuple[str, socket.socket]:
    try:
        address, sock = setup_server(args, reuse_port=False)
    except OSError as error:
        where = args.uds or f"{args.host}:{args.port}"
        raise UsageError(
            f"Cannot listen on {where} ({error.strerror or error}); choose another --port."
        ) from error
    except KeyError as error:
        raise UsageError(str(error.args[0])) from error
    return address, sock


async def _serve(
    args: argparse.Namespace,
    options: ServeOptions,
    vllm_config: VllmConfig,
    listen_address: str,
    sock: socket.socket,
) -> int:
    on_signals(interrupt)
    with Pool(
        ray_address=options.ray_address,
        num_instances=options.num_instances,
        planned_instances=options.planned_instances,
        keys=PoolKeys.generate(),
        progress=progress,
        any_node=options.any_node,
    ) as pool:
        host = pool.connect()
        sockets = FrontendSockets(host, pool.keys, max_output_num_bytes(vllm_config))
        pool.start_scheduler(options.config, host, options.decision_log, options.logs)
        on_signals(interrupt)  # Ray has put its own handler there
        pool.start_instances(
            planner(
                options,
                vllm_config,
                sockets.addresses(),
                pool,
                log_stats=not args.disable_log_stats,
            ),
            resources_of(vllm_config, options.planned_instances),
            timeout_s=envs.VLLM_ENGINE_READY_TIMEOUT_S,
        )
        engine, link = build_engine(
            args,
            vllm_config,
            Surroundings(
                sockets=sockets,
                scheduler_endpoint=pool.scheduler_endpoint,
                prefix_hashes=prefix_hasher(vllm_config) if options.wants_prefix_blocks else None,
                num_labels=options.most_instances,
                engine_indices=range(options.num_instances),
            ),
        )
        client = engine.engine_core
        supervisor = pool.supervise(
            Departures(asyncio.get_running_loop(), client, link),
            max_instances=options.most_instances,
            boot_timeout_s=envs.VLLM_ENGINE_READY_TIMEOUT_S,
            limits=limits_of(options),
        )
        link.supervise_with(supervisor)
        client.tell_of_breaks(lambda index: supervisor.connection_broke(instance_name(index)))
        gates = (sockets.gate, pool.heartbeat_gate)
        metrics = PoolMetrics(lambda: {"frontend": sum(gate.num_unproven for gate in gates)})
        following = asyncio.create_task(metrics.follow(link))
        try:
            if options.num_instances:
                await engine.reset_mm_cache()
            closing = await serve_app(
                args,
                engine,
                admin_router(link, client.routes, supervisor) if options.admin_api else None,
                get_prometheus_registry(),
                listen_address,
                sock,
                begins=lambda: progress(f"serving {args.model} on {listen_address}"),
            )
            await closing
        finally:
            on_signals(signal.SIG_IGN)
            progress("stopping")
            pool.stop_supervising()
            engine.shutdown(timeout=0)
            following.cancel()
            link.close()
            pool.stop()
    return 0
