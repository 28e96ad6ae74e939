"""Which prefix blocks an engine caches, and the same names for them computed in the frontend.

vLLM hashes every full block of a request together with all blocks before it, and with a
cryptographic hash every process finds the same value: so the frontend can name the blocks of a
prompt before any engine has seen it, and the scheduler can tell which instance holds them. The
names are the 64-bit numbers of vLLM's own KV events.

Invariant: changes are handed over in the order in which they happened, each once. What this does
not know: who listens, or what a match is worth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from vllm.config import KVEventsConfig, VllmConfig
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventPublisher,
    KVEventBatch,
)
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    get_block_hash,
    get_request_block_hasher,
    init_none_hash,
    maybe_convert_block_hash,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from llumsched.core.events import Event, KvBlocksRemoved, KvBlocksStored, KvCacheCleared
from llumsched.engine.vllm.compat import accepted, hash_lookahead

# Its hash depends on a seed that each process draws for itself unless PYTHONHASHSEED names one.
SEEDED_ALGORITHMS = frozenset({"xxhash", "xxhash_cbor"})


def record_kv_events(vllm_config: VllmConfig) -> None:
    """Have engines built from this configuration note what they cache; a publisher that the
    operator has set keeps publishing."""
    events = vllm_config.kv_events_config
    if events is None or not events.enable_kv_cache_events:
        vllm_config.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")


def prefix_hasher(vllm_config: VllmConfig) -> Callable[[EngineCoreRequest], tuple[int, ...]]:
    """Names the full blocks of a request's prompt as the engines will.

    The size of a block is read from the configuration at each request: on a GPU it is the engine
    that chooses it, when it has loaded the model, and the frontend's configuration has it from the
    first that is up. The last block is left out where the prompt ends with it: an engine always
    computes at least one token, so it is never reused.
    """
    cache = vllm_config.cache_config
    hash_function = get_hash_fn_by_name(cache.prefix_caching_hash_algo)
    init_none_hash(hash_function)

    @functools.lru_cache(maxsize=1)
    def hasher_of(block_size: int) -> Callable[[Request], list[BlockHash]]:
        lookahead = accepted(
            get_request_block_hasher, num_hash_lookahead_tokens=hash_lookahead(vllm_config)
        )
        hasher: Callable[[Request], list[BlockHash]] = get_request_block_hasher(
            block_size, hash_function, **lookahead
        )
        return hasher

    def hashes(request: EngineCoreRequest) -> tuple[int, ...]:
        # A block is spread over the workers of a context-parallel group.
        block_size = cache.block_size * vllm_config.parallel_config.decode_context_parallel_size
        known = Request.from_engine_core_request(request, hasher_of(block_size))
        num_usable = (known.num_prompt_tokens - 1) // block_size
        return tuple(_name(block_hash) for block_hash in known.block_hashes[:num_usable])

    return hashes


class PrefixBlockRecorder(EventPublisher):
    """Takes the place of the scheduler's event publisher, keeps what it hears until ``take``, and
    passes everything on. Both ends run on the engine's loop thread."""

    def __init__(self, scheduler: Scheduler, instance_id: str) -> None:
        # Not EventPublisher's own initialiser: it only keeps a rank, which nothing asks us for.
        self._scheduler = scheduler
        self._instance_id = instance_id
        self._next = scheduler.kv_event_publisher
        self._changes: list[Event] = []
        # Of the events that wait to be published, those that are among the changes already.
        self._num_told = 0
        scheduler.kv_event_publisher = self

    def publish(self, events: KVEventBatch) -> None:  # type: ignore[override]
        self._record(events.events[self._num_told :])
        self._num_told = 0
        self._next.publish(events)

    def _record(self, events: Iterable[Any]) -> None:
        for event in events:
            match event:
                case BlockStored():
                    self._add(KvBlocksStored, event.block_hashes)
                case BlockRemoved():
                    self._add(KvBlocksRemoved, event.block_hashes)
                case AllBlocksCleared():
                    self._changes.append(KvCacheCleared(instance_id=self._instance_id))

    def _record_pending(self) -> None:
        """Record events between two steps, which are published with the next."""
        pending = self._scheduler.kv_cache_manager.block_pool.kv_event_queue
        self._record(pending[self._num_told :])
        self._num_told = len(pending)

    def _add(self, kind: type[KvBlocksStored] | type[KvBlocksRemoved], hashes: list[Any]) -> None:
        names = tuple(_number(block_hash) for block_hash in hashes)
        last = self._changes[-1] if self._changes else None
        if isinstance(last, kind):
            # A step that evicts for a long prompt says so block by block.
            names = last.block_hashes + names
            self._changes.pop()
        self._changes.append(kind(instance_id=self._instance_id, block_hashes=names))

    def take(self) -> list[Event]:
        """Changes since the last call, in order."""
        self._record_pending()
        changes, self._changes = self._changes, []
        return changes

    def all(self) -> list[Event]:
        """Everything the engine caches now, for a listener that knows nothing; what is pending is
        part of it."""
        self._record_pending()
        self._changes.clear()
        cached = self._scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block
        names = tuple(_name(get_block_hash(key)) for key in cached._cache)
        return [
            KvCacheCleared(instance_id=self._instance_id),
            KvBlocksStored(instance_id=self._instance_id, block_hashes=names),
        ]

    def shutdown(self) -> None:
        self._next.shutdown()

    def get_publisher_config(self) -> KVEventsConfig | None:
        config: KVEventsConfig | None = self._next.get_publisher_config()
        return config


def _name(block_hash: bytes) -> int:
    return _number(maybe_convert_block_hash(block_hash))  # type: ignore[arg-type]


def _number(external: int | bytes) -> int:
    # Bytes where VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES is 0.
    if isinstance(external, bytes):
        return int.from_bytes(external, byteorder="big") & ((1 << 64) - 1)
    return external
