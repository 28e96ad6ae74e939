"""Prefix blocks as an engine tells of them, and as the frontend names them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventPublisher,
    KVEventBatch,
)
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    make_block_hash_with_group_id,
    maybe_convert_block_hash,
)
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from llumsched.core.events import KvBlocksRemoved, KvBlocksStored, KvCacheCleared
from llumsched.engine.vllm import prefix_blocks
from llumsched.engine.vllm.prefix_blocks import PrefixBlockRecorder, prefix_hasher
from tests.builders import engine_request

BLOCK_SIZE = 4


class Published(EventPublisher):
    """The publisher an operator has configured."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.is_shut_down = False

    def publish(self, events: Any) -> None:
        self.batches.append(events)

    def shutdown(self) -> None:
        self.is_shut_down = True


def stored(*hashes: int) -> BlockStored:
    return BlockStored(
        block_hashes=list(hashes),
        parent_block_hash=None,
        token_ids=[],
        block_size=BLOCK_SIZE,
        lora_id=None,
        medium="GPU",
        lora_name=None,
    )


def removed(block_hash: int) -> BlockRemoved:
    return BlockRemoved(block_hashes=[block_hash], medium="GPU")


def make_recorder(cached: Any = ()) -> tuple[PrefixBlockRecorder, Published, Any]:
    blocks = SimpleNamespace(_cache=dict.fromkeys(cached))
    scheduler = SimpleNamespace(
        kv_event_publisher=Published(),
        kv_cache_manager=SimpleNamespace(
            block_pool=SimpleNamespace(cached_block_hash_to_block=blocks, kv_event_queue=[])
        ),
    )
    publisher = scheduler.kv_event_publisher
    return PrefixBlockRecorder(scheduler, "a"), publisher, scheduler  # type: ignore[arg-type]


def test_changes_are_handed_over_in_order_and_once() -> None:
    recorder, _, scheduler = make_recorder()
    publish = scheduler.kv_event_publisher.publish
    publish(KVEventBatch(ts=0.0, events=[stored(1, 2), stored(3), removed(1), removed(2)]))
    publish(KVEventBatch(ts=1.0, events=[removed(3), stored(4), AllBlocksCleared(), stored(5)]))
    assert recorder.take() == [
        KvBlocksStored(instance_id="a", block_hashes=(1, 2, 3)),
        KvBlocksRemoved(instance_id="a", block_hashes=(1, 2, 3)),
        KvBlocksStored(instance_id="a", block_hashes=(4,)),
        KvCacheCleared(instance_id="a"),
        KvBlocksStored(instance_id="a", block_hashes=(5,)),
    ]
    assert recorder.take() == []


def test_what_waits_for_a_step_is_told_at_once_and_once() -> None:
    """Blocks that arrive between two steps are published with the next, if there is one."""
    recorder, publisher, scheduler = make_recorder()
    queue = scheduler.kv_cache_manager.block_pool.kv_event_queue
    queue.append(stored(1))
    assert recorder.take() == [KvBlocksStored(instance_id="a", block_hashes=(1,))]
    queue.append(stored(2))
    batch = KVEventBatch(ts=0.0, events=list(queue))
    queue.clear()
    recorder.publish(batch)
    assert publisher.batches == [batch]
    assert recorder.take() == [KvBlocksStored(instance_id="a", block_hashes=(2,))]
    queue.append(stored(3))
    recorder.all()
    assert recorder.take() == []


def test_the_operators_own_publisher_hears_everything() -> None:
    recorder, publisher, _ = make_recorder()
    batch = KVEventBatch(ts=0.0, events=[stored(1)])
    recorder.publish(batch)
    recorder.shutdown()
    assert publisher.batches == [batch]
    assert publisher.is_shut_down


def asked(num_tokens: int) -> EngineCoreRequest:
    return engine_request(prompt_token_ids=list(range(num_tokens)), cache_salt="salt")


def make_config(block_size: int = BLOCK_SIZE, num_context_workers: int = 1) -> Any:
    """The part of vLLM's configuration that is looked at."""
    return SimpleNamespace(
        cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256", block_size=block_size),
        parallel_config=SimpleNamespace(decode_context_parallel_size=num_context_workers),
    )


def named_by_an_engine(request: EngineCoreRequest, block_size: int) -> list[Any]:
    """The blocks that an engine could reuse: it always computes at least one token of a prompt."""
    init_none_hash(sha256)
    hasher = get_request_block_hasher(block_size, sha256)
    in_engine = Request.from_engine_core_request(request, hasher).block_hashes
    assert request.prompt_token_ids is not None
    reusable = in_engine[: (len(request.prompt_token_ids) - 1) // block_size]
    return [maybe_convert_block_hash(block_hash) for block_hash in reusable]


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 8, 9, 11])
def test_the_frontend_names_blocks_as_the_engine_does(num_tokens: int) -> None:
    request = asked(num_tokens)
    named = prefix_hasher(make_config())(request)
    assert list(named) == named_by_an_engine(request, BLOCK_SIZE)

    init_none_hash(sha256)
    in_engine = Request.from_engine_core_request(
        request, get_request_block_hasher(BLOCK_SIZE, sha256)
    ).block_hashes[: len(named)]
    recorder, _, _ = make_recorder(
        make_block_hash_with_group_id(block_hash, 0) for block_hash in in_engine
    )
    assert recorder.all() == [
        KvCacheCleared(instance_id="a"),
        KvBlocksStored(instance_id="a", block_hashes=named),
    ]


def test_the_size_of_a_block_is_the_one_that_the_engine_has_chosen() -> None:
    """A frontend learns it when the engine is up: after the hasher was made."""
    config, request = make_config(block_size=16), asked(100)
    hashes = prefix_hasher(config)
    assert list(hashes(request)) == named_by_an_engine(request, 16)
    config.cache_config.block_size = 64
    assert list(hashes(request)) == named_by_an_engine(request, 64)


def test_a_block_that_several_workers_share() -> None:
    hashes = prefix_hasher(make_config(num_context_workers=2))
    assert list(hashes(asked(20))) == named_by_an_engine(asked(20), 2 * BLOCK_SIZE)


def test_hashes_look_as_far_ahead_as_those_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines look ahead with EAGLE, from 0.33 on."""
    given: list[tuple[int, int]] = []

    def get_request_block_hasher(
        hash_block_size: int, caching_hash_fn: Any, num_hash_lookahead_tokens: int = 0
    ) -> Any:
        given.append((hash_block_size, num_hash_lookahead_tokens))
        return lambda _request: []

    get_request_block_hasher.__qualname__ = "get_request_block_hasher"
    monkeypatch.setattr(prefix_blocks, "get_request_block_hasher", get_request_block_hasher)
    config = make_config()
    config.num_hash_lookahead_tokens = 3
    assert prefix_hasher(config)(asked(20)) == ()
    assert given == [(BLOCK_SIZE, 3)]
