"""Checks that need nothing started; each mistake is one sentence.

Sizes are estimates from the model's folder and the flags: they exist to say "this cannot fit"
in a second rather than after a minute of booting, so they err on the side of letting it try.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import psutil
import vllm.envs as envs
from vllm.config import VllmConfig
from vllm.tasks import SupportedTask

from llumsched.engine.vllm.prefix_blocks import SEEDED_ALGORITHMS
from llumsched.frontend.options.arguments import UsageError

GIB = 1 << 30
# Resident memory of an instance's process besides weights and KV: Python, torch, vLLM, Ray.
PROCESS_NUM_BYTES = int(0.9 * GIB)
# On CPU, where the flag that limits memory is meant for one engine a machine.
DEFAULT_CPU_KV_NUM_BYTES = 2 * GIB
SHARE_OF_AVAILABLE_MEMORY = 0.9
# What a model can do that `check_tasks` lets pass; once one is up, an instance says so itself.
TASKS_UNASKED: tuple[SupportedTask, ...] = ("generate",)


def check_model(model: str) -> None:
    """Refuse a model folder that is not there or is none.

    Raises:
        UsageError: naming the path.
    """
    looks_like_a_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    path = Path(model).expanduser()
    if looks_like_a_path and not path.exists():
        raise UsageError(f"There is no model at {model}: give a folder or a hub name.")
    if path.is_dir() and not (path / "config.json").exists() and not list(path.glob("*.gguf")):
        raise UsageError(f"{model} is not a model folder: it has no config.json.")


def why_not_served(model: str, default: str, error: Exception) -> str:
    """The reason why vLLM cannot make a configuration for a model, in one sentence.

    Args:
        default: the model that vLLM serves where none is named.
    """
    named = f"{model} (vLLM's default, where no model is named)" if model == default else model
    if "outgoing traffic has been disabled" in str(error):
        return (
            f"{named} cannot be served: it is no folder, it is not in the cache of Hugging Face,"
            " and HF_HUB_OFFLINE forbids to download it. Name a folder, or unset that variable."
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{named} cannot be served: {' '.join(lines[:3]) if lines else type(error).__name__}"


def check_serialization() -> None:
    """Refuse a setting of vLLM's with which its processes run what they are sent.

    Raises:
        UsageError: naming it.
    """
    if envs.VLLM_ALLOW_INSECURE_SERIALIZATION:
        raise UsageError(
            "VLLM_ALLOW_INSECURE_SERIALIZATION is set: vLLM would unpickle what arrives on its "
            "sockets. Unset it; nothing here needs it."
        )


def check_tasks(vllm_config: VllmConfig) -> None:
    """Refuse to start without an instance where only an instance knows what can be asked of it.

    Raises:
        UsageError: naming the way out.
    """
    model = vllm_config.model_config
    names, registry = model.architectures, model.registry
    if (
        model.runner_type != "generate"
        or not registry.is_text_generation_model(names, model)
        or registry.is_transcription_model(names, model)
    ):
        raise UsageError(
            "--instances 0: which requests this model serves is known to a running instance only. "
            "Start with --instances 1; with min_instances 0 it leaves when it is idle."
        )


def check_several_frontends(num_frontends: int) -> None:
    """Refuse settings of vLLM's that one process of several cannot keep for the others.

    Raises:
        UsageError: naming the setting.
    """
    if num_frontends == 1:
        return
    for name, is_set, why in (
        (
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
            envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING,
            "an adapter would be known to the frontend alone that was asked to load it",
        ),
        (
            "VLLM_ENABLE_RESPONSES_API_STORE",
            envs.VLLM_ENABLE_RESPONSES_API_STORE,
            "a response would be known to the frontend alone that gave it",
        ),
        (
            "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION",
            envs.VLLM_DISABLE_REQUEST_ID_RANDOMIZATION,
            "two frontends could have requests of one id",
        ),
    ):
        if is_set:
            raise UsageError(f"{name} is set, and there are several frontends: {why}. Unset it.")


def check_prefix_hashes(vllm_config: VllmConfig, environment: Mapping[str, str]) -> None:
    """Refuse to match prefixes that the processes would name differently.

    Raises:
        UsageError: naming the two ways out.
    """
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    if algorithm in SEEDED_ALGORITHMS and "PYTHONHASHSEED" not in environment:
        raise UsageError(
            f"--prefix-caching-hash-algo {algorithm}: each process draws its own seed, so this "
            "policy could not tell whose cache holds a prompt. Leave the flag out (sha256), or "
            "set PYTHONHASHSEED to a secret number."
        )


def plan_cpu_memory(
    vllm_config: VllmConfig, num_instances: int, environment: Mapping[str, str]
) -> int | None:
    """KV-cache bytes of each worker of a CPU instance, where no flag names them.

    Returns:
        the bytes, or ``None`` if the flags say it themselves.

    Raises:
        UsageError: if the instances cannot fit into this machine's memory.
    """
    available = int(psutil.virtual_memory().available * SHARE_OF_AVAILABLE_MEMORY)
    weights = weight_num_bytes(vllm_config.model_config.model)
    cache = vllm_config.cache_config
    num_workers = vllm_config.parallel_config.world_size
    # The weights are shared out to the workers, the KV cache is named for each of them.
    processes = PROCESS_NUM_BYTES * (num_workers + 1 if num_workers > 1 else 1)
    kv: int | None = cache.kv_cache_memory_bytes
    chosen: int | None = None
    if environment.get("VLLM_CPU_KVCACHE_SPACE"):
        kv = int(environment["VLLM_CPU_KVCACHE_SPACE"]) * GIB
    if kv is None:
        left = available // num_instances - weights - processes
        kv = chosen = max(min(left, DEFAULT_CPU_KV_NUM_BYTES), GIB // 4) // num_workers
    needed = num_instances * (weights + kv * num_workers + processes)
    if needed > available:
        raise UsageError(
            f"{num_instances} instances need about {needed / GIB:.1f} GiB "
            f"({weights / GIB:.1f} of weights, {kv * num_workers / GIB:.1f} of KV cache and "
            f"{processes / GIB:.1f} of process each); {available / GIB:.1f} GiB are "
            "available. Lower --instances, max_instances or --kv-cache-memory-bytes."
        )
    return chosen


def weight_num_bytes(model: str) -> int:
    """Size of a local model's weight files in bytes; 0 for a hub name not on disk."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return 0
    patterns = ("*.safetensors", "*.bin", "*.gguf")
    return max(sum(f.stat().st_size for f in folder.glob(pattern)) for pattern in patterns)


def cpu_threads_per_worker(num_workers: int, environment: Mapping[str, str]) -> int:
    """Threads a worker computes with, of ``num_workers`` in all instances: an even share of the
    cores, at least one.

    One core is left to the frontend, as vLLM leaves one to its own server on CPU.
    """
    chosen = environment.get("OMP_NUM_THREADS")
    if chosen:
        return int(chosen)
    return max(1, (len(os.sched_getaffinity(0)) - 1) // num_workers)
