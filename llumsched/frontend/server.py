"""``llumsched serve``: vLLM's own OpenAI server over a pool of instances.

The order matters: whatever can be found wrong is found before anything is started; the port is
bound first, as vLLM does it; then the pool; then vLLM's ``AsyncLLM`` and app on top of it.
Whatever was started ends with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from typing import Any

import uvloop
import vllm.envs as envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import serve_http, setup_server
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.exceptions import GracefulHTTPError
from vllm.platforms import current_platform
from vllm.tasks import SupportedTask
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine import async_llm as async_llm_module
from vllm.v1.engine.async_llm import AsyncLLM

from llumsched.core.policy import VictimPolicy
from llumsched.engine.vllm.core import EngineSettings
from llumsched.engine.vllm.internals import UnsupportedVersion, check_version
from llumsched.engine.vllm.prefix_blocks import prefix_hasher, record_kv_events
from llumsched.frontend.access import guard, has_key
from llumsched.frontend.admin import admin_router
from llumsched.frontend.arguments import ServeOptions, UsageError, is_local, parse
from llumsched.frontend.client import RoutingEngineClient
from llumsched.frontend.connections import NoInstance
from llumsched.frontend.exposition import expose
from llumsched.frontend.hints import HintsMiddleware
from llumsched.frontend.link import SchedulerLink
from llumsched.frontend.overload import RetryAfterMiddleware
from llumsched.frontend.pool_metrics import PoolMetrics
from llumsched.frontend.preflight import (
    TASKS_UNASKED,
    check_model,
    check_prefix_hashes,
    check_serialization,
    check_tasks,
    cpu_threads_per_worker,
    plan_cpu_memory,
)
from llumsched.frontend.sockets import FrontendSockets, max_output_num_bytes
from llumsched.plugins import build_bundle
from llumsched.policies.low_priority_short import LowPriorityShort
from llumsched.runtime.instance import InstancePlan
from llumsched.runtime.instance_actor import InstanceResources
from llumsched.runtime.instance_names import instance_name
from llumsched.runtime.launch import LaunchError, Pool
from llumsched.runtime.supervisor import Supervisor
from llumsched.runtime.vital_signs import Limits
from llumsched.trust import PoolKeys

logger = logging.getLogger(__name__)

# How long connections may take to close once their requests have ended.
CLOSING_TIMEOUT_S = 3


class Engine(AsyncLLM):
    """vLLM's frontend; its requests end when it does, and it serves also while nothing is up."""

    async def get_supported_tasks(self) -> tuple[SupportedTask, ...]:
        try:
            return await super().get_supported_tasks()
        except NoInstance:
            return TASKS_UNASKED

    def shutdown(self, timeout: float | None = None) -> None:
        # AsyncLLM leaves them waiting for outputs, and their clients for the connection to break.
        stopping = GracefulHTTPError("The server is stopping.", HTTPStatus.SERVICE_UNAVAILABLE)
        self.output_processor.propagate_error(stopping)
        super().shutdown(timeout)


def main(argv: Sequence[str]) -> int:
    """Run the server until it is told to stop; the process's exit status."""
    try:
        args, options = parse(argv)
        check_version(allow_other=options.allow_other_vllm)
        check_model(args.model)
        vllm_config = _engine_config(args)
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
    except (UsageError, UnsupportedVersion) as error:
        sys.stderr.write(f"llumsched serve: {error}\n")
        return 2
    try:
        return uvloop.run(_serve(args, options, vllm_config, listen_address, sock))
    except LaunchError as error:
        sys.stderr.write(f"llumsched serve: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        sock.close()


def _engine_config(args: argparse.Namespace) -> VllmConfig:
    # The engine runs in the instance's own process, where the migrator reaches its KV cache.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        engine_args = AsyncEngineArgs.from_cli_args(args)
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
    _on_signals(_interrupt)
    host = "127.0.0.1"
    sockets = FrontendSockets(host, PoolKeys.generate(), max_output_num_bytes(vllm_config))
    log_stats = not args.disable_log_stats
    with Pool(
        ray_address=options.ray_address,
        num_instances=options.num_instances,
        planned_instances=options.planned_instances,
        keys=sockets.keys,
        progress=_progress,
    ) as pool:
        pool.start_scheduler(options.config, host, options.decision_log)
        _on_signals(_interrupt)  # Ray has put its own handler there
        make_plan = _planner(options, vllm_config, sockets, pool, host, log_stats)
        pool.start_instances(
            make_plan,
            _resources(vllm_config, options.planned_instances),
            timeout_s=envs.VLLM_ENGINE_READY_TIMEOUT_S,
        )
        link_holder: list[SchedulerLink] = []
        prefix_hashes = prefix_hasher(vllm_config) if options.wants_prefix_blocks else None
        with _our_client(sockets, options, link_holder, pool.scheduler_endpoint, prefix_hashes):
            engine = Engine.from_vllm_config(
                vllm_config=vllm_config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                enable_log_requests=args.enable_log_requests,
                aggregate_engine_logging=args.aggregate_engine_logging,
                disable_log_stats=args.disable_log_stats,
            )
        link = link_holder[0]
        client = engine.engine_core
        assert isinstance(client, RoutingEngineClient)
        supervisor = pool.supervise(
            Departures(asyncio.get_running_loop(), client, link),
            max_instances=options.most_instances,
            boot_timeout_s=envs.VLLM_ENGINE_READY_TIMEOUT_S,
            limits=Limits(
                heartbeat_s=options.heartbeat_timeout_s,
                step_s=options.step_timeout_s,
                loop_uses_cpu=current_platform.is_cpu(),
            ),
        )
        link.supervise_with(supervisor)
        client.tell_of_breaks(lambda index: supervisor.connection_broke(instance_name(index)))
        gates = (sockets.gate, pool.heartbeat_gate)
        following = asyncio.create_task(PoolMetrics(gates).follow(link))
        try:
            if options.num_instances:
                await engine.reset_mm_cache()
            closing = await _serve_http(
                args, options, engine, link, supervisor, listen_address, sock
            )
            await closing
        finally:
            _on_signals(signal.SIG_IGN)
            _progress("stopping")
            pool.stop_supervising()
            engine.shutdown(timeout=0)
            following.cancel()
            link.close()
            pool.stop()
    return 0


class Departures:
    """Tells frontend and scheduler, on the loop, of instances that are gone or will not come."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, client: RoutingEngineClient, link: SchedulerLink
    ) -> None:
        self._loop = loop
        self._client = client
        self._link = link

    def gone(self, engine_index: int, *, expected: bool) -> None:
        def tell() -> None:
            self._client.instance_lost(engine_index, expected=expected)
            self._link.instance_gone(instance_name(engine_index))

        self._loop.call_soon_threadsafe(tell)

    def refused(self, launch_id: str, reason: str) -> None:
        self._loop.call_soon_threadsafe(self._link.launch_refused, launch_id, reason)


def _planner(
    options: ServeOptions,
    vllm_config: VllmConfig,
    sockets: FrontendSockets,
    pool: Pool,
    host: str,
    log_stats: bool,
) -> Callable[[int, str | None], InstancePlan]:
    """What an instance is told, by its engine index and the scheduler's order that it answers."""
    victim: VictimPolicy = build_bundle(options.config).victim or LowPriorityShort()
    # The frontend's own is changed by what the first instances say of themselves.
    untouched = copy.deepcopy(vllm_config)

    def plan(index: int, launch_id: str | None) -> InstancePlan:
        return InstancePlan(
            instance_id=instance_name(index),
            engine=EngineSettings(
                vllm_config=untouched,
                frontend_addresses=sockets.addresses(),
                engine_index=index,
                log_stats=log_stats,
            ),
            keys=sockets.keys,
            scheduler_endpoint=pool.scheduler_endpoint,
            heartbeat_endpoint=pool.heartbeat_endpoint,
            host=host,
            victim=victim,
            migration=options.config.migration_options,
            transfer=options.config.transfer_options,
            reports_prefix_blocks=options.wants_prefix_blocks,
            launch_id=launch_id,
        )

    return plan


def _resources(vllm_config: VllmConfig, num_instances: int) -> InstanceResources:
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # The workers of an engine are on one machine; gloo asks nobody who connects for a proof.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    num_workers = vllm_config.parallel_config.world_size
    if not current_platform.is_cpu():
        return InstanceResources(num_cpus=1, num_gpus=num_workers, environment=environment)
    num_threads = cpu_threads_per_worker(num_instances * num_workers, os.environ)
    environment["OMP_NUM_THREADS"] = str(num_threads)
    if num_workers > 1:
        # By itself vLLM wants a NUMA node for each worker, and binds all instances to the same.
        bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        environment["VLLM_CPU_OMP_THREADS_BIND"] = bound
    if os.environ.get("LD_PRELOAD"):
        # vLLM's CPU platform has set it, for the OpenMP library that torch brings.
        environment["LD_PRELOAD"] = os.environ["LD_PRELOAD"]
    return InstanceResources(num_cpus=1, num_gpus=0, environment=environment)


@contextlib.contextmanager
def _our_client(
    sockets: FrontendSockets,
    options: ServeOptions,
    link_holder: list[SchedulerLink],
    scheduler_endpoint: str,
    prefix_hashes: Callable[[EngineCoreRequest], tuple[int, ...]] | None,
) -> Iterator[None]:
    """While this lasts, ``AsyncLLM`` builds its client as one over the pool.

    ``AsyncLLM`` offers no parameter for its client, so the name it looks up is replaced.
    """

    def make_client(
        vllm_config: VllmConfig, *_: Any, renderer: Any = None, **__: Any
    ) -> RoutingEngineClient:
        client: RoutingEngineClient | None = None

        def least_loaded() -> int | None:
            assert client is not None
            return min(client.instances, key=client.routes.num_requests, default=None)

        link = SchedulerLink(scheduler_endpoint, sockets.keys, least_loaded, prefix_hashes)
        link_holder.append(link)
        client = RoutingEngineClient(
            vllm_config,
            sockets=sockets,
            engine_indices=range(options.num_instances),
            placer=link,
            renderer=renderer,
            num_labels=options.most_instances,
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


async def _serve_http(
    args: argparse.Namespace,
    options: ServeOptions,
    engine: AsyncLLM,
    link: SchedulerLink,
    supervisor: Supervisor,
    listen_address: str,
    sock: socket.socket,
) -> Any:
    """vLLM's ``build_and_serve``, with the admin routes added to its app."""
    supported_tasks = await engine.get_supported_tasks()
    # Its flag for middleware: once built, the app takes no more.
    args.middleware = [
        *args.middleware,
        *(f"{m.__module__}.{m.__name__}" for m in (HintsMiddleware, RetryAfterMiddleware)),
    ]
    app = build_app(args, supported_tasks, engine.model_config)
    expose(app, engine.engine_core.labels)
    if options.admin_api:
        app.include_router(admin_router(link, engine.engine_core.routes, supervisor))
    guard(app)
    if options.admin_api and not has_key(args) and not is_local(args):
        logger.warning(
            "Whoever reaches %s may move requests and end instances: give --api-key as well.",
            listen_address,
        )
    await init_app_state(engine, app.state, args, supported_tasks)
    log_config = get_uvicorn_log_config(args)
    uvicorn_options: dict[str, Any] = {} if log_config is None else {"log_config": log_config}
    _progress(f"serving {args.model} on {listen_address}")
    return await serve_http(
        app,
        sock=sock,
        enable_ssl_refresh=args.enable_ssl_refresh,
        host=args.host,
        port=args.port,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        timeout_graceful_shutdown=engine.vllm_config.shutdown_timeout + CLOSING_TIMEOUT_S,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers,
        h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
        h11_max_header_count=args.h11_max_header_count,
        **uvicorn_options,
    )


def _on_signals(handler: Callable[..., None] | signal.Handlers) -> None:
    """What Ctrl-C and SIGTERM do. While vLLM's server runs, they are its own."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _interrupt(*_: object) -> None:
    """While booting: unwind at once, though the loop is blocked; a second signal must not
    interrupt what ends the processes."""
    _on_signals(signal.SIG_IGN)
    raise KeyboardInterrupt


def _progress(sentence: str) -> None:
    sys.stdout.write(f"llumsched: {sentence}\n")
    sys.stdout.flush()
