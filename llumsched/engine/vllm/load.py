"""Load reports of an instance, read from vLLM's scheduler on the loop thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from vllm.v1.request import Request

from llumsched.core.load import InstanceLoad, InstanceSpec
from llumsched.core.types import InstanceRole, priority_class
from llumsched.engine.vllm.core import LlumschedEngineCore
from llumsched.engine.vllm.migration.groups import num_blocks_of

# A change since the last report that is worth an extra one: this share of all blocks.
LARGE_CHANGE_OF_BLOCKS = 0.1


class LoadReader:
    """Reads load reports of one engine. Every method runs on the engine's loop thread."""

    def __init__(self, engine: LlumschedEngineCore, instance_id: str) -> None:
        self._engine = engine
        self._instance_id = instance_id
        self._scheduler = engine.scheduler
        self._block_pool = engine.scheduler.kv_cache_manager.block_pool
        self._block_size: int = engine.vllm_config.cache_config.block_size
        # One block of the pool is vLLM's null block and never holds tokens.
        self._num_total_blocks: int = self._block_pool.num_gpu_blocks - 1
        self._sequence = 0
        self._received: list[str] = []
        self._known: set[str] = set()
        self._told: dict[str, int] = {}
        """Output tokens less steps of those that run, as a report told them last."""
        self._last_free_blocks = self._num_total_blocks
        self._last_num_waiting = 0

    def spec(self, role: InstanceRole = InstanceRole.MIXED) -> InstanceSpec:
        config = self._engine.vllm_config.scheduler_config
        return InstanceSpec(
            instance_id=self._instance_id,
            num_total_blocks=self._num_total_blocks,
            block_size=self._block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            role=role,
        )

    def on_add(self, request: Request) -> None:
        self._received.append(request.request_id)
        self._known.add(request.request_id)

    def forget(self, request_id: str) -> None:
        """A request left by migration: it did not finish."""
        self._known.discard(request_id)

    def has_changed_much(self) -> bool:
        """True if load moved far enough since the last report for another one at once."""
        changed_blocks = abs(self._block_pool.get_num_free_blocks() - self._last_free_blocks)
        if changed_blocks > LARGE_CHANGE_OF_BLOCKS * self._num_total_blocks:
            return True
        return (self._last_num_waiting == 0) != (self._scheduler.get_request_counts()[1] == 0)

    def read(
        self,
        *,
        num_reserved_blocks: int,
        num_migrations_in: int,
        num_migrations_out: int,
        victim_blocks: int | None = None,
    ) -> InstanceLoad:
        """The load now, and which requests came and ended since the last call."""
        scheduler = self._scheduler
        waiting = list(scheduler.waiting)
        num_running, num_waiting = scheduler.get_request_counts()
        finished = [
            request_id for request_id in self._known if request_id not in scheduler.requests
        ]
        self._known.difference_update(finished)
        received, self._received = self._received, []
        self._sequence += 1
        self._last_free_blocks = self._block_pool.get_num_free_blocks()
        self._last_num_waiting = num_waiting
        unfinished = [
            (request.num_prompt_tokens, request.num_computed_tokens)
            for request in (*waiting, *scheduler.running)
            if request.num_computed_tokens < request.num_prompt_tokens
        ]
        classes = Counter(int(priority_class(request.priority)) for request in scheduler.running)
        return InstanceLoad(
            instance_id=self._instance_id,
            sequence=self._sequence,
            num_total_blocks=self._num_total_blocks,
            num_free_blocks=self._last_free_blocks,
            num_reserved_blocks=num_reserved_blocks,
            num_running=num_running,
            num_waiting=num_waiting,
            head_of_line_blocks=self._num_blocks(waiting[0]) if waiting else 0,
            num_waiting_blocks=sum(self._num_blocks(request) for request in waiting),
            num_waiting_tokens=sum(request.num_tokens for request in waiting),
            num_prefill_tokens_pending=sum(whole - done for whole, done in unfinished),
            num_prefill_pairs_pending=sum(
                (whole * whole - done * done) // 2 for whole, done in unfinished
            ),
            step_time_s=self._engine.step_time_s,
            step=self._engine.take_step(),
            num_running_by_class=tuple(sorted(classes.items())),
            victim_blocks=victim_blocks,
            num_migrations_in=num_migrations_in,
            num_migrations_out=num_migrations_out,
            num_decode_steps=self._engine.num_steps,
            progress=tuple(self._progress(self._engine.num_steps)),
            received_request_ids=tuple(received),
            finished_request_ids=tuple(finished),
        )

    def _progress(self, num_steps: int) -> Iterator[tuple[str, int, int]]:
        """(id, tokens computed, output tokens) of running requests, where these do not follow from
        what was told before and the steps since: a step gives each that decodes one token. What
        left the batch and has not ended has nothing computed."""
        before, self._told = self._told, {}
        for request in self._scheduler.running:
            computed, outputs = request.num_computed_tokens, request.num_output_tokens
            decodes = outputs > 0 and computed >= request.num_tokens - 1
            lag = outputs - num_steps if decodes else -computed - 1
            self._told[request.request_id] = lag
            if before.pop(request.request_id, None) != lag:
                yield request.request_id, computed, outputs
        for request_id in before:
            evicted = self._scheduler.requests.get(request_id)
            if evicted is not None:
                yield request_id, 0, evicted.num_output_tokens

    def _num_blocks(self, request: Request) -> int:
        return num_blocks_of(self._scheduler.kv_cache_manager, request.num_tokens)
