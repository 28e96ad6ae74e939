"""Blocks of a request in every group of a cache, on vLLM's own managers, with no model.

A block's content is noted here: which tokens it has of which request, or the state after how many.
A request is decoded at a source, copied in stages, and goes on at a destination, where every block
that its next token depends on must have its content.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request, RequestStatus

from llumsched.core.migration.groups import order_of
from llumsched.core.migration.messages import CopyBlocks
from llumsched.engine.base import NO_BLOCK, CannotMigrate
from llumsched.engine.vllm.compat import installed_version, minor_of
from llumsched.engine.vllm.migration.groups import (
    ArrivingBlocks,
    PinnedBlocks,
    cache_groups,
    num_blocks_of,
)
from llumsched.migration.runs import runs_of

NUM_BLOCKS = 200
MAX_LEN = 2048
SIZE: dict[str, Any] = {"num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}


def full(block_size: int = 16) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=block_size, **SIZE)


def window(sliding_window: int, block_size: int = 16) -> SlidingWindowSpec:
    return SlidingWindowSpec(block_size=block_size, sliding_window=sliding_window, **SIZE)


def chunk(attention_chunk_size: int) -> ChunkedLocalAttentionSpec:
    return ChunkedLocalAttentionSpec(
        block_size=16, attention_chunk_size=attention_chunk_size, **SIZE
    )


def state(mode: str) -> MambaSpec:
    return MambaSpec(
        block_size=MAX_LEN if mode == "none" else 16,
        shapes=((64,),),
        dtypes=(torch.float32,),
        page_size_padded=full().page_size_bytes,
        mamba_cache_mode=mode,
    )


# Name: groups, and whether prefixes are cached.
CACHES: dict[str, tuple[tuple[Any, ...], bool]] = {
    "full": ((full(),), True),
    "full, window": ((full(), window(64)), True),
    "two windows to one full": ((window(40), full(), window(40)), True),
    "window alone": ((window(24),), True),
    "window smaller than a block": ((window(5),), True),
    "window, no prefix caching": ((full(), window(64)), False),
    "blocks of two sizes": ((full(32), window(48, 16)), True),
    "full, chunks": ((full(), chunk(48)), True),
    "full, state": ((full(), state("none")), False),
    "full, two states": ((full(), state("none"), state("none")), False),
    "full, state, aligned": ((full(), state("align")), True),
    "full, state, all": ((full(), state("all")), True),
    "state alone": ((state("none"),), False),
}


class Cache:
    """An engine's KV cache: vLLM's manager of it, and what its blocks have."""

    def __init__(self, specs: tuple[Any, ...], *, has_prefix_cache: bool) -> None:
        config = KVCacheConfig(
            num_blocks=NUM_BLOCKS,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec([f"l{i}"], spec) for i, spec in enumerate(specs)],
        )
        sizes = [spec.block_size for spec in specs]
        self.manager = KVCacheManager(
            config,
            max_model_len=MAX_LEN,
            scheduler_block_size=max(sizes),
            hash_block_size=min(sizes) if has_prefix_cache else max(sizes),
            enable_caching=has_prefix_cache,
        )
        self.hash_block_size = min(sizes)
        self.managers = self.manager.coordinator.single_type_managers
        self.content: list[Any] = [None] * NUM_BLOCKS
        self.arriving = ArrivingBlocks(self.manager)

    @property
    def num_free(self) -> int:
        return self.manager.block_pool.get_num_free_blocks()

    def request(self, tokens: list[int]) -> Request:
        init_none_hash(sha256)
        return Request(
            "r",
            tokens,
            SamplingParams(max_tokens=1000),
            None,
            block_hasher=get_request_block_hasher(self.hash_block_size, sha256),
        )

    def compute(self, request: Request, num_tokens: int) -> None:
        """A step: blocks for so many more tokens, and their content."""
        self.manager.new_step_starts()
        hit = None
        num_hit = 0
        if request.num_computed_tokens == 0:
            hit, num_hit, *_ = self.manager.get_computed_blocks(request)
            num_tokens -= num_hit
        assert self.manager.allocate_slots(
            request, num_tokens, num_new_computed_tokens=num_hit, new_computed_blocks=hit
        )
        request.num_computed_tokens += num_hit
        end = request.num_computed_tokens + num_tokens
        for manager in self.managers:
            blocks = manager.req_to_blocks["r"]
            if isinstance(manager.kv_cache_spec, MambaSpec):
                assert request.num_computed_tokens == 0 or self.has_state(manager, request)
                place = (end - 1) // manager.block_size
                self.content[blocks[place].block_id] = ("state", tuple(request.all_token_ids[:end]))
                continue
            for position in range(request.num_computed_tokens, end):
                block = blocks[position // manager.block_size]
                if block.is_null:
                    continue  # a prompt longer than the window
                place = position // manager.block_size
                first = place * manager.block_size
                tokens = tuple(request.all_token_ids[first : position + 1])
                self.content[block.block_id] = (first, tokens)
        request.num_computed_tokens = end

    def has_state(self, manager: Any, request: Request) -> bool:
        num_tokens = request.num_computed_tokens
        block = manager.req_to_blocks["r"][(num_tokens - 1) // manager.block_size]
        expected = ("state", tuple(request.all_token_ids[:num_tokens]))
        return bool(self.content[block.block_id] == expected)

    def check(self, request: Request) -> None:
        """All that the next token depends on is there."""
        for manager in self.managers:
            if isinstance(manager.kv_cache_spec, MambaSpec):
                assert self.has_state(manager, request)
                continue
            first = max(0, manager.get_num_skipped_tokens(request.num_computed_tokens))
            for position in range(first, request.num_computed_tokens):
                begin, tokens = self.content[
                    manager.req_to_blocks["r"][position // manager.block_size].block_id
                ]
                assert begin == position // manager.block_size * manager.block_size
                assert tokens[position - begin] == request.all_token_ids[position]

    def check_prefix_cache(self, tokens: list[int]) -> None:
        """Every block that is cached has what its hash says, for a request that follows."""
        follower = self.request([*tokens, 1])
        follower.request_id = "follower"
        hit, num_hit, *_ = self.manager.get_computed_blocks(follower)
        for manager, blocks in zip(self.managers, hit.blocks, strict=True):
            for place, block in enumerate(blocks):
                if block.is_null:
                    continue
                content = self.content[block.block_id]
                first, last = place * manager.block_size, (place + 1) * manager.block_size
                if isinstance(manager.kv_cache_spec, MambaSpec):
                    assert content == ("state", tuple(tokens[:num_hit]))
                else:
                    assert content == (first, tuple(tokens[first:last]))


@pytest.fixture(params=CACHES)
def caches(request: pytest.FixtureRequest) -> Iterator[tuple[Cache, Cache]]:
    specs, has_prefix_cache = CACHES[request.param]
    if request.param == "full, state, all" and minor_of(installed_version()) == "0.33":
        pytest.skip("vLLM 0.33 has no such cache")
    made = tuple(Cache(specs, has_prefix_cache=has_prefix_cache) for _ in range(2))
    source, destination = made
    num_free = source.num_free
    yield source, destination
    for cache in made:
        assert cache.num_free == num_free


def move(source: Cache, destination: Cache, request: Request, chance: random.Random) -> Request:
    """In stages, between which the request is decoded at the source."""
    order = order_of(cache_groups(source.manager))
    assert order.groups == cache_groups(destination.manager)
    pinned = PinnedBlocks(source.manager, request, request.num_tokens - 1)
    arriving = destination.request(list(request.prompt_token_ids or []))
    arriving.append_output_token_ids(list(request.output_token_ids))
    num_copied = destination.arriving.hold(arriving, MAX_LEN)
    for stage in range(3):
        is_last = stage == 2
        if is_last:
            pinned.pin_all(request.num_computed_tokens)
            last = order.num_blocks(request.num_computed_tokens)
        else:
            pinned.pin_full(request.num_computed_tokens)
            last = order.num_settled(request.num_computed_tokens)
        if last > num_copied:
            command = CopyBlocks(
                migration_id="m", stage=1, first_block=num_copied, num_blocks=last - num_copied
            )
            destination.arriving.grow(arriving, pinned.num_tokens)
            tables = destination.arriving.block_ids(arriving)
            for run in runs_of(order, command, pinned.block_ids, pinned.num_tokens):
                place = tables[run.group][run.first : run.first + len(run.block_ids)]
                assert len(place) == len(run.block_ids)
                assert NO_BLOCK not in place
                for here, there in zip(run.block_ids, place, strict=True):
                    destination.content[there] = source.content[here]
            num_copied = last
        for _ in range(0 if is_last else chance.randrange(60)):
            request.append_output_token_ids(chance.randrange(1000))
            source.compute(request, 1)
    arriving.append_output_token_ids(list(request.output_token_ids)[arriving.num_output_tokens :])
    arriving.num_computed_tokens = request.num_computed_tokens
    destination.arriving.settle(arriving, request.num_computed_tokens)
    arriving.status = RequestStatus.PREEMPTED
    pinned.unpin()
    source.manager.free(request)
    return arriving


@pytest.mark.parametrize("seed", range(6))
def test_there_and_back_again(caches: tuple[Cache, Cache], seed: int) -> None:
    chance = random.Random(seed)
    here, there = caches
    prompt = [chance.randrange(1000) for _ in range(chance.choice([1, 15, 16, 33, 100, 160]))]
    request = here.request(prompt)
    here.compute(request, len(prompt))
    for _ in range(4):
        for _ in range(chance.randrange(1, 40)):
            request.append_output_token_ids(chance.randrange(1000))
            here.compute(request, 1)
        request.append_output_token_ids(chance.randrange(1000))  # sampled, not computed yet
        request = move(here, there, request, chance)
        here, there = there, here
        here.check(request)
        here.check_prefix_cache(list(request.all_token_ids)[: request.num_computed_tokens])
        here.compute(request, 1)
        here.check(request)
    here.manager.free(request)


def test_blocks_of_a_request(caches: tuple[Cache, Cache]) -> None:
    """Blocks held once a step has given back those that the request has left behind."""
    here, _ = caches
    request = here.request(list(range(150)))
    here.compute(request, 150)
    for _ in range(40):
        request.append_output_token_ids(7)
        here.compute(request, 1)
    here.manager.remove_skipped_blocks("r", request.num_computed_tokens)
    held = [block for manager in here.managers for block in manager.req_to_blocks["r"]]
    expected = sum(not block.is_null for block in held)
    assert num_blocks_of(here.manager, request.num_computed_tokens) == expected
    here.manager.free(request)


def test_no_room_holds_nothing(caches: tuple[Cache, Cache]) -> None:
    here, there = caches
    taken = there.manager.block_pool.get_new_blocks(there.num_free)
    request = here.request(list(range(100)))
    request.append_output_token_ids([1])
    with pytest.raises(CannotMigrate, match=r"has 0 free blocks, the request needs"):
        there.arriving.hold(request, MAX_LEN)
    there.manager.block_pool.free_blocks(taken)
