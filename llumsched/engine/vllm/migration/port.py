"""Knowledge of both sides of a migration: the engine, and the requests that it was sent.

Knows neither how a request leaves (``exports``) nor how one arrives (``imports``).
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from vllm.v1.executor import UniProcExecutor
from vllm.v1.request import Request

from llumsched.engine.base import KVAccess
from llumsched.engine.compatibility import PROTOCOL_VERSION, Compatibility, fingerprint_of
from llumsched.engine.transfer.access import LocalKV
from llumsched.engine.transfer.shards import ShardedKV
from llumsched.engine.vllm.compat import installed_version
from llumsched.engine.vllm.core import LlumschedEngineCore
from llumsched.engine.vllm.migration.frees import DeferredFrees
from llumsched.engine.vllm.migration.groups import cache_groups, num_blocks_of
from llumsched.engine.vllm.migration.kv import open_blocks, open_shard
from llumsched.engine.vllm.migration.places import BatchPlaces
from llumsched.engine.vllm.migration.speculation import drafter_of
from llumsched.engine.vllm.migration.state import why_engine_cannot_migrate


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request came by this placement, at ``at_s`` (``time.monotonic()``)."""

    placement_number: int
    at_s: float


class EngineAdapter:
    """Invariant: every method of it and of its subclasses runs on the engine's loop thread.

    ``refusal`` is the reason why no request of this engine can move, or ``None``; ``kv`` is its KV
    cache, unless there is such a reason. ``groups`` are the groups of that cache.
    """

    def __init__(self, engine: LlumschedEngineCore) -> None:
        self._engine = engine
        self._scheduler = engine.scheduler
        self._kv_manager = engine.scheduler.kv_cache_manager
        self.groups = cache_groups(self._kv_manager)
        self._arrivals: WeakKeyDictionary[Request, Arrival] = WeakKeyDictionary()
        # Changes while a request decodes; the destination starts from what it was at first.
        self._reasoning_ended_at_arrival: WeakKeyDictionary[Request, bool | None] = (
            WeakKeyDictionary()
        )
        self.refusal = why_engine_cannot_migrate(
            engine.vllm_config, self._kv_manager.kv_cache_config
        )
        self.kv = self._open_kv_cache() if self.refusal is None else None
        self.places = BatchPlaces(engine.scheduler)
        self.frees = DeferredFrees(engine.scheduler)
        engine.observe(
            around_reset=self.frees.at_once,
            before_step=self.places.before_step,
            after_step=self.places.after_step,
            on_add=self._on_add,
        )

    def close(self) -> None:
        """Let go of the KV cache; nothing may be copied any more."""
        if self.kv is not None:
            self.kv.close()

    def _open_kv_cache(self) -> KVAccess | None:
        executor = self._engine.model_executor
        try:
            if isinstance(executor, UniProcExecutor):
                return LocalKV(open_blocks(executor.driver_worker.worker.model_runner))
            return ShardedKV(
                lambda pid, pipes: self._engine.collective_rpc(open_shard, args=(pid, pipes)),
                num_workers=self._engine.vllm_config.parallel_config.world_size,
            )
        except ValueError as error:
            self.refusal = str(error)
            return None

    def fingerprint(self) -> str:
        """Fingerprint that must be equal on two instances for a request to move between them."""
        config = self._engine.vllm_config
        model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
        groups = self._kv_manager.kv_cache_config.kv_cache_groups
        return fingerprint_of(
            Compatibility(
                protocol=PROTOCOL_VERSION,
                vllm=installed_version(),
                model=str(model.model),
                revision=str(model.revision or ""),
                quantization=str(model.quantization or ""),
                dtype=str(model.dtype),
                max_model_len=model.max_model_len,
                block_size=cache.block_size,
                kv_dtype=str(cache.cache_dtype),
                kv_spec=tuple(str(group.kv_cache_spec) for group in groups),
                kv_layout=self.kv.layout if self.kv is not None else "",
                attention_backend=self.kv.backend if self.kv is not None else "",
                tensor_parallel=parallel.tensor_parallel_size,
                pipeline_parallel=parallel.pipeline_parallel_size,
                model_runner=2 if config.use_v2_model_runner else 1,
                lora=config.lora_config is not None,
                drafter=drafter_of(config),
            )
        )

    def _on_add(self, request: Request) -> None:
        structured = request.structured_output_request
        if structured is not None:
            self._reasoning_ended_at_arrival[request] = structured.reasoning_ended

    def _num_blocks(self, num_tokens: int) -> int:
        return num_blocks_of(self._kv_manager, num_tokens)
