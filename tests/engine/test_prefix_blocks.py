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
from vllm.sampling_params import SamplingParams
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
from llumsched.engine.vllm.prefix_blocks import PrefixBlockRecorder, prefix_hasher

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
            block_pool=SimpleNamespace(cached_block_hash_to_block=blocks)
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


def test_the_operators_own_publisher_hears_everything() -> None:
    recorder, publisher, _ = make_recorder()
    batch = KVEventBatch(ts=0.0, events=[stored(1)])
    recorder.publish(batch)
    recorder.shutdown()
    assert publisher.batches == [batch]
    assert publisher.is_shut_down


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 8, 9, 11])
def test_the_frontend_names_blocks_as_the_engine_does(num_tokens: int) -> None:
    """Those an engine could reuse: it always computes at least one token of a prompt."""
    asked = EngineCoreRequest(
        request_id="r1",
        prompt_token_ids=list(range(num_tokens)),
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=5),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt="salt",
        data_parallel_rank=None,
    )
    config: Any = SimpleNamespace(
        cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256", block_size=BLOCK_SIZE)
    )
    named = prefix_hasher(config)(asked)

    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
    in_engine = Request.from_engine_core_request(asked, hasher).block_hashes
    reusable = in_engine[: (num_tokens - 1) // BLOCK_SIZE]
    assert list(named) == [maybe_convert_block_hash(block_hash) for block_hash in reusable]

    recorder, _, _ = make_recorder(
        make_block_hash_with_group_id(block_hash, 0) for block_hash in reusable
    )
    assert recorder.all() == [
        KvCacheCleared(instance_id="a"),
        KvBlocksStored(instance_id="a", block_hashes=named),
    ]
