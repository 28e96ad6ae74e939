"""Configuration of an instance of this server, and the resources Ray sets aside for it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.engine.utils import EngineZmqAddresses

from llumsched.config import build_bundle
from llumsched.core.policy import VictimPolicy
from llumsched.engine.vllm.core import EngineSettings
from llumsched.frontend.options.arguments import ServeOptions
from llumsched.frontend.options.gpu_share import instances_per_gpu
from llumsched.frontend.options.preflight import cpu_threads_per_worker
from llumsched.frontend.options.shared_endpoints import for_instance
from llumsched.instance.actor import InstancePlan
from llumsched.instance.report_pace import IDLE_REPORT_INTERVAL_S
from llumsched.policies.low_priority_short import LowPriorityShort
from llumsched.pool.instance_actor import InstanceResources
from llumsched.pool.liveness import LivenessLimits
from llumsched.pool.pool import Pool
from llumsched.wire.names import instance_name


def planner(
    options: ServeOptions,
    vllm_config: VllmConfig,
    frontend_addresses: EngineZmqAddresses,
    pool: Pool,
    *,
    log_stats: bool,
) -> Callable[[int, str | None], InstancePlan]:
    """Function from an engine index, and the launch it answers, to the instance's configuration.

    Args:
        frontend_addresses: of every frontend, in the order of their client indices.
        pool: its scheduler has been started.
    """
    bundle = build_bundle(options.config)
    victim: VictimPolicy = bundle.victim or LowPriorityShort()
    # Often enough that none is taken for silent.
    idle_report_interval_s = min(IDLE_REPORT_INTERVAL_S, bundle.options.stale_after_s / 3)
    # The frontend's own is changed by what the first instances say of themselves.
    untouched = copy.deepcopy(vllm_config)
    num_cores = cores_of_instance(vllm_config, options.planned_instances)

    def plan(index: int, launch_id: str | None) -> InstancePlan:
        return InstancePlan(
            instance_id=instance_name(index),
            engine=EngineSettings(
                vllm_config=for_instance(untouched, index),
                frontend_addresses=frontend_addresses,
                engine_index=index,
                log_stats=log_stats,
            ),
            keys=pool.keys,
            scheduler_endpoint=pool.scheduler_endpoint,
            heartbeat_endpoint=pool.heartbeat_endpoint,
            host=pool.instances_host,
            victim=victim,
            migration=options.config.migration_options,
            transfer=options.config.transfer_options,
            reports_prefix_blocks=options.wants_prefix_blocks,
            launch_id=launch_id,
            num_cores=num_cores,
            idle_report_interval_s=idle_report_interval_s,
            shares_gpu=instances_per_gpu(options.gpus_per_instance or 1) > 1,
            logs=options.logs,
        )

    return plan


def limits_of(options: ServeOptions) -> LivenessLimits:
    """Beyond which an instance that does not end by itself is dead."""
    return LivenessLimits(
        heartbeat_s=options.heartbeat_timeout_s,
        step_s=options.step_timeout_s,
    )


def cores_of_instance(vllm_config: VllmConfig, num_instances: int) -> int:
    """Cores that each of so many instances has for itself; 0 if they share all.

    They share where there are fewer cores than threads, and where vLLM is told what to bind.
    """
    if not current_platform.is_cpu() or "VLLM_CPU_OMP_THREADS_BIND" in os.environ:
        return 0
    if vllm_config.parallel_config.world_size > 1 or not hasattr(os, "sched_setaffinity"):
        return 0
    num_threads = cpu_threads_per_worker(num_instances, os.environ)
    enough = num_threads * num_instances <= len(os.sched_getaffinity(0))
    return num_threads if enough else 0


def resources_of(vllm_config: VllmConfig, options: ServeOptions) -> InstanceResources:
    """Resources that an instance needs, and its environment."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # The workers of an engine are on one machine; gloo asks nobody who connects for a proof.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    num_workers = vllm_config.parallel_config.world_size
    if not current_platform.is_cpu():
        num_gpus = options.gpus_per_instance or num_workers
        return InstanceResources(num_cpus=1, num_gpus=num_gpus, environment=environment)
    num_threads = cpu_threads_per_worker(options.planned_instances * num_workers, os.environ)
    environment["OMP_NUM_THREADS"] = str(num_threads)
    if num_workers > 1:
        # By itself vLLM wants a NUMA node for each worker, and binds all instances to the same.
        bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        environment["VLLM_CPU_OMP_THREADS_BIND"] = bound
    if os.environ.get("LD_PRELOAD"):
        # vLLM's CPU platform has set it, for the OpenMP library that torch brings.
        environment["LD_PRELOAD"] = os.environ["LD_PRELOAD"]
    return InstanceResources(num_cpus=1, num_gpus=0, environment=environment)
