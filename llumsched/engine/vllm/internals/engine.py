"""Internals of vLLM used in an instance: loop, scheduler, blocks, requests, workers."""

from __future__ import annotations

from llumsched.engine.vllm.internals.entry import Internal

_CORE = "vllm.v1.engine.core:EngineCoreProc"
_ENGINE = "vllm.v1.engine.core:EngineCore"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_KV = "vllm.v1.core.kv_cache_manager:KVCacheManager"
_COORDINATOR = "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator"
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager"
_POOL = "vllm.v1.core.block_pool:BlockPool"
_REQUEST = "vllm.v1.request:Request"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"

ENGINE_INTERNALS: tuple[Internal, ...] = (
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
    Internal(_CORE, "_perform_handshakes", "give addresses, not negotiate them"),
    Internal(_CORE, "_handle_client_request", "run closures", ("request_type", "request")),
    Internal(_CORE, "_process_engine_step", "observe steps"),
    Internal(_CORE, "run_busy_loop", "serve"),
    Internal(_CORE, "input_queue", "hand over closures", on_instances=True),
    Internal(_CORE, "output_queue", "announce arrivals in order", on_instances=True),
    Internal(_CORE, "shutdown_state", "end the loop", on_instances=True),
    Internal(_ENGINE, "_process_aborts_queue", "resume after aborts of an old copy"),
    Internal(_CORE, "engine_index", "tell instances apart", on_instances=True),
    Internal(_ENGINE, "add_request", "notice arrivals", ("request", "request_wave")),
    Internal(_ENGINE, "abort_requests", "notice aborts", ("request_ids",)),
    Internal(_ENGINE, "preprocess_add_request", "build a request", ("request",)),
    Internal(
        _CORE,
        "reject_new_requests",
        "refuse arrivals while paused",
        on_instances=True,
        since="0.33",
    ),
    Internal(
        "vllm.utils.watch_dog",
        "start_watch_dog",
        "dump the stacks of an engine that hangs",
        ("name", "watchdog_config", "logger"),
        since="0.33",
    ),
    Internal(_ENGINE, "collective_rpc", "install worker state", ("method", "args")),
    Internal(_ENGINE, "shutdown", "free the engine"),
    Internal(
        _ENGINE,
        "reset_prefix_cache",
        "free deferred blocks before",
        ("reset_running_requests", "reset_connector"),
    ),
    Internal(_ENGINE, "step_fn", "warm up", on_instances=True),
    Internal(_ENGINE, "post_step", "warm up", ("model_executed",)),
    Internal(_CORE, "has_work", "warm up"),
    Internal(_ENGINE, "scheduler", "migrate", on_instances=True),
    Internal(_ENGINE, "model_executor", "find the KV cache", on_instances=True),
    Internal(_ENGINE, "structured_output_manager", "replay a grammar", on_instances=True),
    Internal("vllm.v1.engine.core:EngineShutdownState", "REQUESTED", "end the loop"),
    # The engine core's messages.
    Internal(
        "vllm.v1.engine.utils",
        "EngineZmqAddresses",
        "tell the addresses of the frontends",
        ("inputs", "outputs"),
    ),
    Internal("vllm.v1.engine", "EngineCoreRequest", "carry a request"),
    Internal("vllm.v1.engine", "EngineCoreOutputs", "carry outputs"),
    Internal("vllm.v1.engine", "EngineCoreOutput", "end a lost request"),
    Internal("vllm.v1.engine:EngineCoreOutput", "error", "ask another instance", since="0.33"),
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
    *(
        Internal(_SCHEDULER, name, for_what, on_instances=True)
        for name, for_what in (
            ("max_num_active_reqs", "keep places in the batch"),
            ("num_waiting_for_streaming_input", "count places in the batch"),
            ("lora_config", "take in no adapter too many"),
            ("scheduler_config", "leave tokens of a step for arrivals"),
            ("max_num_scheduled_tokens", "leave tokens of a step for arrivals"),
            ("use_v2_model_runner", "know what the worker keeps of a request"),
            ("reset_preempted_req_ids", "give a suspended request's slot back"),
            ("defer_block_free", "free no block that a step in flight writes"),
            ("deferred_frees", "empty the prefix cache"),
            ("sched_step_seq", "know the steps in flight"),
            ("processed_step_seq", "know the steps in flight"),
            ("num_spec_tokens", "pad nothing that resumes with drafts"),
            ("dynamic_sd_lookup", "pad nothing that resumes with drafts"),
            ("num_lookahead_tokens", "reserve what a drafter writes ahead"),
        )
    ),
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
    Internal(_KV, "get_block_ids", "find blocks", ("request_id",)),
    Internal(_KV, "create_kv_cache_blocks", "reserve blocks", ("blocks",)),
    Internal(_KV, "remove_skipped_blocks", "leave a window's past behind", ("request_id",)),
    Internal(_KV, "coordinator", "find the blocks of each group", on_instances=True),
    Internal(_COORDINATOR, "single_type_managers", "find blocks", on_instances=True),
    Internal(_MANAGER, "req_to_blocks", "pin blocks, place a state", on_instances=True),
    Internal(_MANAGER, "block_size", "count blocks", on_instances=True),
    Internal(_MANAGER, "kv_cache_spec", "tell states from attention", on_instances=True),
    Internal(_MANAGER, "new_block_ids", "not zero what has come", on_instances=True),
    Internal(_MANAGER, "get_num_skipped_tokens", "know a window", ("num_computed_tokens",)),
    Internal(
        _MANAGER,
        "allocate_new_blocks",
        "grow a reservation",
        ("request_id", "num_tokens", "num_tokens_main_model"),
    ),
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
        ("hash_block_size", "caching_hash_fn", "num_hash_lookahead_tokens"),
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
    Internal("vllm.v1.kv_cache_interface", "MLAAttentionSpec", "check the cache's kind"),
    Internal("vllm.exceptions", "VLLMClientError", "refuse a grammar that cannot be made"),
    Internal(_SCHEDULER, "pause_state", "refuse while paused"),
    Internal("vllm.config:ModelConfig", "enable_sleep_mode", "refuse what sleeps"),
    Internal("vllm.config:ModelConfig", "is_diffusion", "refuse diffusion models"),
    Internal("vllm.config:VllmConfig", "aux_output_config", "refuse to return experts"),
    # A request.
    Internal(_REQUEST, "append_output_token_ids", "restore outputs", ("token_ids",)),
    *(
        Internal(_REQUEST, name, "carry or check its state", on_instances=True)
        for name in (
            "status",
            "num_computed_tokens",
            "num_in_flight_tokens",
            "num_output_placeholders",
            "is_prefill_chunk",
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
            "spec_token_ids",
            "spec_decode_metrics",
        )
    ),
    Internal("vllm.v1.request:RequestStatus", "PREEMPTED", "tell an arrival"),
    Internal("vllm.v1.request:RequestStatus", "FINISHED_ABORTED", "tell a departure"),
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
)
