"""Settings of vLLM that are read or set: configuration, flags, environment, platform."""

from __future__ import annotations

from collections.abc import Iterator

from llumsched.engine.vllm.compat import CLI_ARGS
from llumsched.engine.vllm.internals.entry import Internal


def _each(
    where: str, for_what: str, *names: str, or_where: tuple[str, ...] = ()
) -> Iterator[Internal]:
    return (Internal(where, name, for_what, or_where=or_where) for name in names)


CONFIGURATION: tuple[Internal, ...] = (
    *_each(
        "vllm.config:VllmConfig",
        "configure engines",
        "model_config",
        "cache_config",
        "parallel_config",
        "scheduler_config",
        "device_config",
        "lora_config",
        "speculative_config",
        "kv_transfer_config",
        "kv_events_config",
        "logging_config",
        "shutdown_timeout",
    ),
    *_each(
        "vllm.config:ModelConfig",
        "tell models apart",
        "model",
        "revision",
        "quantization",
        "dtype",
        "max_model_len",
        "max_logprobs",
        "get_vocab_size",
        "architectures",
        "registry",
    ),
    Internal("vllm.config:ModelConfig", "runner_type", "tell models apart", on_instances=True),
    *_each(
        "vllm.config:CacheConfig",
        "size and name KV blocks",
        "block_size",
        "cache_dtype",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "prefix_caching_hash_algo",
    ),
    *_each(
        "vllm.config:ParallelConfig",
        "know the workers of an engine",
        "world_size",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "distributed_executor_backend",
    ),
    *_each("vllm.config:SchedulerConfig", "report load", "max_num_seqs", "max_num_batched_tokens"),
    *_each(
        "vllm.config:KVEventsConfig", "hear what is cached", "enable_kv_cache_events", "publisher"
    ),
    # Flags.
    *_each(
        f"{CLI_ARGS[0]}:FrontendArgs",
        "serve as vLLM's flags say",
        "host",
        "port",
        "uds",
        "middleware",
        "api_key",
        "uvicorn_log_level",
        "disable_uvicorn_access_log",
        "enable_ssl_refresh",
        "ssl_keyfile",
        "ssl_certfile",
        "ssl_ca_certs",
        "ssl_cert_reqs",
        "ssl_ciphers",
        "h11_max_incomplete_event_size",
        "h11_max_header_count",
        "tool_parser_plugin",
        or_where=tuple(f"{place}:FrontendArgs" for place in CLI_ARGS[1:]),
    ),
    *_each(
        "vllm.engine.arg_utils:AsyncEngineArgs",
        "make the configuration of engines",
        "from_cli_args",
        "create_engine_config",
        "model",
        "data_parallel_size",
        "pipeline_parallel_size",
        "enable_log_requests",
        "aggregate_engine_logging",
        "disable_log_stats",
        "reasoning_parser_plugin",
    ),
    # Environment and platform.
    *_each(
        "vllm.envs",
        "serve as vLLM's environment says",
        "VLLM_ALLOW_INSECURE_SERIALIZATION",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "VLLM_API_KEY",
        "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION",
        "VLLM_ENABLE_RESPONSES_API_STORE",
        "VLLM_ENGINE_READY_TIMEOUT_S",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE",
    ),
    *_each(
        "vllm.platforms.interface:Platform",
        "tell what engines compute on",
        "device_name",
        "is_cpu",
        "is_cuda_alike",
        "is_unspecified",
        "get_device_total_memory",
    ),
)
