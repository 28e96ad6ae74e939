"""Code of vLLM that is relied on, though nothing here calls it.

A request that is taken out of a queue, or put into one, is vLLM's to schedule, to send to a worker
and to forget. Names and parameters say nothing of that, so these are here for their bodies, which
``make vllm-diff`` compares.
"""

from __future__ import annotations

from llumsched.engine.vllm.internals.entry import Internal, each

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_ASYNC_SCHEDULER = "vllm.v1.core.sched.async_scheduler:AsyncScheduler"
_CORE = "vllm.v1.engine.core:EngineCoreProc"
_RUNNER_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_RUNNER_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"


RELIED_ON: tuple[Internal, ...] = (
    # The engine's loop and its two socket threads.
    *each(
        _CORE,
        "run closures between two steps",
        "_process_input_queue",
        "_handle_shutdown",
        "step",
        "step_with_batch_queue",
        "post_step",
    ),
    *each(_CORE, "serve several frontends", "process_input_sockets", "process_output_sockets"),
    *each(_CORE, "tell a frontend the block size", "_make_ready_response"),
    *each(_CORE, "stay paused", "pause_scheduler", "resume_scheduler"),
    # Blocks of a group that is no full attention.
    *each(
        "vllm.v1.core.single_type_kv_cache_manager:MambaManager",
        "place a state, and go on from it",
        "get_num_blocks_to_allocate",
        "allocate_new_blocks",
        "remove_skipped_blocks",
        "cache_blocks",
    ),
    *each(
        "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager",
        "know which blocks a window has left behind",
        "find_longest_cache_hit",
        "get_num_skipped_tokens",
    ),
    *each(
        "vllm.v1.worker.mamba_utils",
        "go on from a state after an arrival",
        "preprocess_mamba",
        "cleanup_mamba_state_idx",
    ),
    # Scheduling of requests that came, went, or came back.
    *each(
        _SCHEDULER,
        "schedule arrivals and what was taken back",
        "schedule",
        "_update_after_schedule",
        "_make_cached_request_data",
        "update_from_output",
        "_update_request_with_output",
        "_free_request",
        "_free_request_blocks",
    ),
    *each(
        _ASYNC_SCHEDULER,
        "know which tokens are in flight",
        "__init__",
        "_update_after_schedule",
    ),
    *(
        Internal(queue, name, "take a waiting request out, or put it back")
        for queue in (
            "vllm.v1.core.sched.request_queue:FCFSRequestQueue",
            "vllm.v1.core.sched.request_queue:PriorityRequestQueue",
        )
        for name in ("add_request", "prepend_request", "remove_request", "__iter__")
    ),
    *each(
        "vllm.v1.core.sched.output:NewRequestData", "send an arrival to runner V2", "from_request"
    ),
    *each("vllm.v1.request:Request", "tell which tokens are computed", "__init__", "num_tokens"),
    # Workers.
    *each(_RUNNER_V1, "take an arrival into the batch", "_update_states"),
    *each(
        _RUNNER_V2,
        "take an arrival into the batch",
        "add_requests",
        "update_requests",
        "finish_requests",
        "_remove_request",
        "initialize_kv_cache",
    ),
    Internal(_RUNNER_V2, "kv_caches", "copy blocks", on_instances=True),
    *each(
        "vllm.v1.worker.gpu.states:RequestState",
        "hold a slot no longer than needed",
        "__init__",
        "add_request",
        "remove_request",
    ),
    *(
        Internal(f"vllm.v1.worker.{worker}", "use_v2_model_runner", "tell the runner", (), True)
        for worker in ("gpu_worker:Worker", "cpu_worker:CPUWorker")
    ),
    *each(
        "vllm.v1.worker.gpu.sample.penalties:PenaltiesState",
        "count a moved request's tokens again",
        "add_request",
        "apply_staged_writes",
    ),
    *each(
        "vllm.v1.worker.gpu.sample.states:SamplingStates",
        "draw by seed and position",
        "add_request",
    ),
    *each(
        "vllm.v1.executor.uniproc_executor:UniProcExecutor",
        "run a function in every worker",
        "collective_rpc",
    ),
    *each(
        "vllm.v1.executor.multiproc_executor:MultiprocExecutor",
        "run a function in every worker",
        "collective_rpc",
    ),
    # The KV cache's memory.
    *each(
        "vllm.v1.kv_cache_interface",
        "find a block's bytes",
        "create_kv_cache_views",
        "KVCacheConfig",
        "KVCacheTensor",
    ),
    *each("vllm.v1.worker.utils", "find a block's bytes", "allocate_kv_cache"),
    *each(
        "vllm.v1.attention.backends.utils",
        "find a block's bytes",
        "get_supported_kv_cache_layouts",
        "resolve_kv_cache_layout",
    ),
    *each(
        "vllm.v1.core.kv_cache_utils", "name blocks as engines do", "resolve_kv_cache_block_sizes"
    ),
    # Initialisers that subclasses of ours replace, and what their attributes are read by.
    *each("vllm.v1.engine.core_client:MPClient", "stand in for it", "__init__"),
    *each(
        "vllm.v1.engine.core_client:AsyncMPClient",
        "stand in for it",
        "__init__",
        "_send_input_message",
        "get_output_async",
    ),
    *each(
        "vllm.v1.engine.async_llm:AsyncLLM",
        "serve by our client",
        "__init__",
        "get_supported_tasks",
        "_run_output_handler",
        "pause_generation",
    ),
    *each("vllm.config:VllmConfig", "tell the runner", "use_v2_model_runner"),
    Internal(
        "vllm.config:VllmConfig",
        "watchdog_config",
        "dump the stacks of an engine that hangs",
        since="0.33",
    ),
    Internal(
        "vllm.config:VllmConfig",
        "num_hash_lookahead_tokens",
        "name blocks as engines do",
        since="0.33",
    ),
    *each("vllm.config:VllmConfig", "tell how many steps overlap", "max_concurrent_batches"),
)
