"""``llumsched serve``: vLLM's own OpenAI server over a pool of instances.

The order matters: whatever can be found wrong is found before anything is started; the port is
bound first, as vLLM does it; then this process is the launcher of everything else (``launcher``).
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence

import uvloop
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

from llumsched.engine.vllm.compat import CLI_ARGS, first_of
from llumsched.engine.vllm.prefix_blocks import record_kv_events
from llumsched.frontend.options.arguments import UsageError, parse
from llumsched.frontend.options.console import PROCESS
from llumsched.frontend.options.gpu_share import check_device, share_gpus
from llumsched.frontend.options.preflight import (
    check_model,
    check_prefix_hashes,
    check_serialization,
    check_several_frontends,
    check_tasks,
    plan_cpu_memory,
    why_not_served,
)
from llumsched.frontend.options.shared_endpoints import check_shared
from llumsched.frontend.workers import launcher
from llumsched.logs import set_up
from llumsched.pool.ray_cluster import LaunchError


def main(argv: Sequence[str]) -> int:
    """Run the server until it is told to stop; the process's exit status."""
    try:
        check_device()  # vLLM's parser fails without one
        args, options = parse(argv)
        set_up(PROCESS, options.logs)
        check_model(args.model)
        check_several_frontends(options.num_frontends)
        vllm_config = _engine_config(args, options.num_frontends)
        check_serialization()
        share_gpus(vllm_config, options)
        check_shared(vllm_config, options.planned_instances)
        if not options.num_instances:
            check_tasks(vllm_config)
        if options.wants_prefix_blocks:
            check_prefix_hashes(vllm_config, os.environ)
            record_kv_events(vllm_config)
        if current_platform.is_cpu():
            kv_bytes = plan_cpu_memory(vllm_config, options.planned_instances, os.environ)
            if kv_bytes is not None:
                vllm_config.cache_config.kv_cache_memory_bytes = kv_bytes
        listen_address, sock = bind(args)
    except UsageError as error:
        sys.stderr.write(f"llumsched serve: {error}\n")
        return 2
    try:
        return uvloop.run(launcher.serve(args, options, vllm_config, listen_address, sock))
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
        if not getattr(args, "enable_flash_late_interaction", True):  # 0.31 has no such flag
            first_of(CLI_ARGS, "propagate_flash_late_interaction")(args, engine_args)
        # With more than one, also if there is but one frontend: then it does not rely on an
        # instance to have kept an image, which it may have sent to another.
        engine_args._api_process_count = max(2, num_frontends)
        engine_args._api_process_rank = -1
        config: VllmConfig = engine_args.create_engine_config(
            usage_context=UsageContext.OPENAI_API_SERVER
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(why_not_served(args.model, AsyncEngineArgs.model, error)) from error
    return config


def bind(args: argparse.Namespace) -> tuple[str, socket.socket]:
    """The address that clients connect to, in words, and the socket that listens there.

    Raises:
        UsageError: if nobody can listen there.
    """
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
