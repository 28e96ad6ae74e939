"""Internals of vLLM used in a frontend: the client of its engines, and its server."""

from __future__ import annotations

from llumsched.engine.vllm.compat import CLI_ARGS
from llumsched.engine.vllm.internals.entry import Internal

_CLIENT = "vllm.v1.engine.core_client:AsyncMPClient"
_MP_CLIENT = "vllm.v1.engine.core_client:MPClient"

FRONTEND_INTERNALS: tuple[Internal, ...] = (
    # The frontend.
    Internal("vllm.v1.engine.async_llm", "EngineCoreClient", "replace AsyncLLM's client"),
    Internal(_CLIENT, "add_request_async", "route", ("request",)),
    Internal(_CLIENT, "abort_requests_async", "route", ("request_ids",)),
    Internal(_CLIENT, "call_utility_async", "ask every instance", ("method",)),
    Internal(_CLIENT, "call_utility_all_async", "ask every instance", ("method",), since="0.32"),
    Internal(_CLIENT, "_call_utility_async", "ask one instance", ("method", "engine")),
    Internal(_MP_CLIENT, "shutdown", "end our tasks", ("timeout",)),
    Internal(_CLIENT, "_ensure_output_queue_task", "merge outputs"),
    Internal(_CLIENT, "_send_input", "send to an instance", ("request_type", "request", "engine")),
    Internal(_MP_CLIENT, "_apply_ready_response", "learn the block count", ("payload",)),
    Internal(_MP_CLIENT, "_start_mm_warmup", "warm up the renderer"),
    *(
        Internal(_MP_CLIENT, name, "stand in for MPClient.__init__", on_instances=True)
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
        Internal(_CLIENT, name, "stand in for MPClient.__init__", on_instances=True)
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
        "take in answers of instances",
        ("output", "utility_results"),
    ),
    Internal(
        "vllm.v1.engine.core",
        "make_zmq_socket",
        "connect with the pool's keys",
        ("ctx", "path"),
    ),
    # The server.
    Internal("vllm.config.logging", "LoggingConfig", "log as vLLM does", ("formatter",)),
    Internal(
        "vllm.entrypoints.serve.middleware.authenticate", "GUARDED_PREFIX", "ask for the API key"
    ),
    Internal(
        CLI_ARGS[0], "make_arg_parser", "take vLLM's own flags", ("parser",), or_where=CLI_ARGS[1:]
    ),
    Internal(
        CLI_ARGS[0],
        "validate_parsed_serve_args",
        "make vLLM's own checks",
        ("args",),
        or_where=CLI_ARGS[1:],
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
        "serve vLLM's own app",
        ("args", "supported_tasks", "model_config"),
    ),
    Internal(
        "vllm.entrypoints.launchers.api_server.app_state",
        "init_app_state",
        "serve vLLM's own app",
        ("engine_client", "state", "args", "supported_tasks"),
    ),
    Internal(
        "vllm.entrypoints.launchers.utils.server_utils",
        "get_uvicorn_log_config",
        "log as vLLM does",
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
        "vllm.v1.engine.async_llm:AsyncLLM",
        "check_admission",
        "take nothing while it stops",
        ("n", "request_id"),
    ),
    Internal(
        "vllm.v1.engine.async_llm:AsyncLLM",
        "add_request",
        "refuse what cannot be encoded",
        ("request_id", "prompt", "params"),
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
        "be vLLM's own frontend",
        (
            "vllm_config",
            "usage_context",
            "enable_log_requests",
            "aggregate_engine_logging",
            "disable_log_stats",
        ),
    ),
)
