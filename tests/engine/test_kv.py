"""Gathering blocks into staging memory and scattering them elsewhere moves exactly their bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llumsched.engine.vllm.migration.kv import KVBlocks

NUM_BLOCKS = 7
NUM_LAYERS = 3
BLOCK_SIZE = 4
HEAD_SIZE = 8

# Keys and values in one row of the block (CPU attention), or kept apart (FlashAttention).
FUSED = (NUM_BLOCKS, 2, BLOCK_SIZE, 2 * HEAD_SIZE)
APART = (2, NUM_BLOCKS, BLOCK_SIZE, 2, HEAD_SIZE)
LAYOUTS = pytest.mark.parametrize("shape", [FUSED, APART], ids=["fused", "apart"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])


def make_caches(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 100, shape, generator=generator).to(dtype) for _ in range(NUM_LAYERS)]


def block(cache: torch.Tensor, block_id: int) -> torch.Tensor:
    return cache[block_id] if cache.shape[0] == NUM_BLOCKS else cache[:, block_id]


@LAYOUTS
@DTYPES
@given(data=st.data())
def test_blocks_arrive_and_nothing_else_changes(
    shape: tuple[int, ...], dtype: torch.dtype, data: st.DataObject
) -> None:
    source, destination = make_caches(shape, dtype, 1), make_caches(shape, dtype, 2)
    before = [cache.clone() for cache in destination]
    ids = st.permutations(range(NUM_BLOCKS))
    num_moved = data.draw(st.integers(1, NUM_BLOCKS))
    from_ids, to_ids = data.draw(ids)[:num_moved], data.draw(ids)[:num_moved]
    sender, receiver = KVBlocks(source, NUM_BLOCKS), KVBlocks(destination, NUM_BLOCKS)
    assert sender.layout == receiver.layout

    # Staging may be larger than needed, as the last chunk of a stage does not fill its slot.
    staging = torch.zeros((num_moved + 1) * sender.block_num_bytes, dtype=torch.uint8)
    sender.gather(from_ids, staging)
    receiver.scatter(to_ids, staging)

    assert not staging[num_moved * sender.block_num_bytes :].any()
    for layer in range(NUM_LAYERS):
        for block_id in range(NUM_BLOCKS):
            expected = (
                block(source[layer], from_ids[to_ids.index(block_id)])
                if block_id in to_ids
                else block(before[layer], block_id)
            )
            assert torch.equal(block(destination[layer], block_id), expected)


@LAYOUTS
def test_size_of_a_block(shape: tuple[int, ...]) -> None:
    blocks = KVBlocks(make_caches(shape, torch.bfloat16, 0), NUM_BLOCKS)
    assert blocks.block_num_bytes == NUM_LAYERS * 2 * BLOCK_SIZE * 2 * HEAD_SIZE * 2


def test_layouts_tell_caches_apart() -> None:
    caches = [
        make_caches(FUSED, torch.float32, 0),
        make_caches(FUSED, torch.bfloat16, 0),
        make_caches(APART, torch.float32, 0),
        make_caches((NUM_BLOCKS, 2, BLOCK_SIZE, HEAD_SIZE), torch.float32, 0),
        make_caches(FUSED, torch.float32, 0)[1:],
    ]
    layouts = [KVBlocks(cache, NUM_BLOCKS).layout for cache in caches]
    assert len(set(layouts)) == len(layouts)


@pytest.mark.parametrize(
    "cache",
    [
        pytest.param(torch.zeros(5, BLOCK_SIZE, HEAD_SIZE), id="not that many blocks"),
        pytest.param(torch.zeros(NUM_BLOCKS * 4), id="no blocks"),
        pytest.param(
            torch.zeros(BLOCK_SIZE, NUM_BLOCKS, HEAD_SIZE).transpose(0, 1), id="not contiguous"
        ),
    ],
)
def test_other_layouts_are_refused(cache: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="cannot migrate"):
        KVBlocks([cache], NUM_BLOCKS)


@pytest.mark.parametrize("block_id", [-1, 5])
def test_a_block_that_there_is_not(block_id: int) -> None:
    kv = KVBlocks([torch.zeros(5, 2, 8)], 5)
    staging = torch.zeros(2 * kv.block_num_bytes, dtype=torch.uint8)
    with pytest.raises(IndexError):
        kv.gather([0, block_id], staging)
    with pytest.raises(IndexError):
        kv.scatter([0, block_id], staging)
