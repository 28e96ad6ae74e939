"""Flags of ``vllm serve`` that mean nothing in a pool of instances: refused, with what to do.

All others reach the engines (fields of vLLM's ``AsyncEngineArgs``) or the server (of its
``FrontendArgs``) as they do in vLLM; a test holds every flag of vLLM's parser to that. What is in
here vLLM's own launcher would have acted on, in whose place a pool is started.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

INDEPENDENT = "--instances N runs N independent engines instead"
ONE_MACHINE = "the workers of an instance are on one machine; use --tensor-parallel-size there"
PROCESSES = "--frontends K runs K processes"
HTTP = "only vLLM's HTTP server is served"
ACTOR = "each instance is an actor of Ray, with its workers beside it; leave the flag out"
RAY_CHOOSES = "Ray gives each instance its GPUs; set CUDA_VISIBLE_DEVICES for the server instead"
NUMA = "start the server under numactl, or leave the flag out"
ONE_ENGINE = "it shares memory with one engine, and there are several; leave the flag out"


@dataclass(frozen=True, slots=True)
class Refused:
    """A flag by its ``name`` among the arguments, and ``instead``: what to do.

    ``values`` tells which of its values are refused; without it all are but the default.
    """

    name: str
    instead: str
    values: Callable[[Any], bool] | None = None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


REFUSED: tuple[Refused, ...] = (
    *(
        Refused(name, INDEPENDENT)
        for name in (
            "data_parallel_rank",
            "data_parallel_start_rank",
            "data_parallel_size_local",
            "data_parallel_address",
            "data_parallel_rpc_port",
            "data_parallel_backend",
            "data_parallel_hybrid_lb",
            "data_parallel_external_lb",
            "data_parallel_multi_port_external_lb",
            "data_parallel_supervisor_port",
            "dp_supervisor_probe_interval_s",
            "dp_supervisor_probe_timeout_s",
            "dp_supervisor_probe_failure_threshold",
            "enable_elastic_ep",
            "enable_fault_tolerance",
            "headless",
        )
    ),
    *(
        Refused(name, ONE_MACHINE)
        for name in ("pipeline_parallel_size", "nnodes", "node_rank", "master_addr", "master_port")
    ),
    Refused("api_server_count", PROCESSES, lambda count: count not in (None, 1)),
    Refused("grpc", HTTP),
    Refused("grpc_port", HTTP),
    Refused(
        "distributed_executor_backend",
        ACTOR,
        lambda backend: backend in ("ray", "external_launcher"),
    ),
    Refused("ray_workers_use_nsight", ACTOR),
    Refused("device_ids", RAY_CHOOSES),
    Refused("numa_bind", NUMA),
    Refused("numa_bind_nodes", NUMA),
    Refused("numa_bind_cpus", NUMA),
    Refused("mm_tensor_ipc", ONE_ENGINE, lambda way: way == "torch_shm"),
    Refused("mm_processor_cache_type", ONE_ENGINE, lambda kind: kind == "shm"),
)


def take_data_parallel_size(
    args: argparse.Namespace, parser: argparse.ArgumentParser
) -> str | None:
    """``--data-parallel-size N`` as ``--instances N``; why not, in a sentence, or ``None``.

    Ranks that share no experts are engines that know nothing of one another, as instances are.
    """
    size: int = args.data_parallel_size
    if size == parser.get_default("data_parallel_size"):
        return None
    if args.enable_expert_parallel:
        return (
            "--data-parallel-size with --enable-expert-parallel is not supported: such ranks take "
            "every step together, and instances none; give each instance its experts by "
            "--tensor-parallel-size, and say --instances N."
        )
    if args.instances not in (parser.get_default("instances"), size):
        return (
            f"--data-parallel-size {size} means as many instances, and there is "
            f"--instances {args.instances}; leave one of them out."
        )
    args.instances, args.data_parallel_size = size, parser.get_default("data_parallel_size")
    return None


def refusal(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str | None:
    """Why these arguments cannot be served, in a sentence, or ``None``."""
    for refused in REFUSED:
        # Some are of newer versions of vLLM only.
        given = getattr(args, refused.name, None)
        default = parser.get_default(refused.name)
        is_refused = refused.values(given) if refused.values is not None else given != default
        if is_refused:
            return f"{refused.flag} is not supported; {refused.instead}."
    return None
