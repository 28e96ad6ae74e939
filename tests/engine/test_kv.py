"""Blocks move byte by byte in every KV cache layout that vLLM has, and nothing else changes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.kv_cache_interface import KVCacheGroupSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from llumsched.engine.transfer.blocks import BlockLayout, KVBlocks, Runs, joined, runs_of
from llumsched.engine.vllm.migration.kv import block_layouts, open_blocks
from tests.engine.vllm_caches import BLOCK_SIZE, KINDS, NUM_BLOCKS, NUM_LAYERS, make_cache

HEADS_OUTSIDE = (KVCacheLayout.LHBNC, KVCacheLayout.BHLNC)
# What vLLM itself has no KV cache for.
NOT_IN_VLLM = {
    *itertools.product(("padded", "mixed pages"), HEADS_OUTSIDE),
    *itertools.product(
        ("split", "MLA, split"),
        (KVCacheLayout.BLHNC, KVCacheLayout.BLNHC, KVCacheLayout.BHLNC),
    ),
    ("split", KVCacheLayout.LHBNC),
}
ALL = list(itertools.product(KINDS, KVCacheLayout))
CACHES = [case for case in ALL if case not in NOT_IN_VLLM]
EACH_CACHE = pytest.mark.parametrize(
    ("kind", "layout"), CACHES, ids=[f"{kind}, {layout.name}" for kind, layout in CACHES]
)


@EACH_CACHE
def test_blocks_arrive_and_nothing_else_changes(kind: str, layout: KVCacheLayout) -> None:
    source, destination = (make_cache(KINDS[kind], layout, seed) for seed in (1, 2))
    assert source.blocks.layout.text == destination.blocks.layout.text
    from_ids, to_ids = [4, 0, 6], [1, 6, 3]
    before = destination.buffer.clone()

    # Staging may be larger than needed, as the last part of a stage does not fill its slot.
    staging = torch.zeros(4 * source.blocks.block_num_bytes, dtype=torch.uint8)
    source.blocks.gather(from_ids, staging)
    destination.blocks.scatter(to_ids, staging)

    assert not staging[3 * source.blocks.block_num_bytes :].any()
    for from_id, to_id in zip(from_ids, to_ids, strict=True):
        for sent, arrived in zip(source.content(from_id), destination.content(to_id), strict=True):
            assert torch.equal(sent, arrived)
    theirs = destination.bytes_of(to_ids)
    assert int(theirs.sum()) == 3 * source.blocks.block_num_bytes
    assert torch.equal(before[~theirs], destination.buffer[~theirs])


@pytest.mark.parametrize(("kind", "layout"), sorted(NOT_IN_VLLM, key=str))
def test_vllm_has_no_such_cache(kind: str, layout: KVCacheLayout) -> None:
    """Else it belongs among those that are moved here."""
    with pytest.raises((ValueError, AssertionError)):
        make_cache(KINDS[kind], layout, 0)


@pytest.mark.parametrize(
    ("layout", "num_runs"),
    [
        (KVCacheLayout.LBNHC, NUM_LAYERS),
        (KVCacheLayout.LBHNC, NUM_LAYERS),
        (KVCacheLayout.LHBNC, NUM_LAYERS * 4),
        (KVCacheLayout.BLNHC, 1),
        (KVCacheLayout.BLHNC, 1),
        (KVCacheLayout.BHLNC, 1),
    ],
    ids=lambda given: getattr(given, "name", None),
)
def test_all_layers_are_one_grid_of_runs(layout: KVCacheLayout, num_runs: int) -> None:
    (runs,) = make_cache(KINDS["GQA"], layout, 0).blocks.layout.runs
    assert runs.num_runs == num_runs
    assert runs.num_bytes == NUM_LAYERS * 4 * BLOCK_SIZE * 2 * 8 * 2


def test_texts_tell_caches_apart() -> None:
    """Heads before and after tokens have shapes and sizes alike; only the name differs."""
    texts = [make_cache(KINDS[kind], layout, 0).blocks.layout.text for kind, layout in CACHES]
    same = {
        frozenset(cases)
        for text in texts
        if len(cases := [case for case, t in zip(CACHES, texts, strict=True) if t == text]) > 1
    }
    # Their data types differ, or the bytes of a block do not.
    for alike in same:
        assert len({layout for _, layout in alike}) == 1
        sizes = {
            make_cache(KINDS[kind], layout, 0).blocks.block_num_bytes for kind, layout in cases
        }
        assert len(sizes) == 1


def test_the_number_of_blocks_does_not_matter() -> None:
    """Two pools of different sizes have other strides, and exchange blocks."""
    runs = [
        Runs(offset=0, num_runs=2, run_stride=n * 8, block_stride=8, run_num_bytes=8)
        for n in (3, 5)
    ]
    small, large = (
        KVBlocks(
            torch.arange(n * 16, dtype=torch.uint8),
            BlockLayout(name="L", num_blocks=n, runs=(each,)),
        )
        for n, each in zip((3, 5), runs, strict=True)
    )
    assert small.layout.text == large.layout.text
    staging = torch.zeros(16, dtype=torch.uint8)
    small.gather([2], staging)
    large.scatter([4], staging)
    assert large.buffer[32:40].tolist() == list(range(16, 24))
    assert large.buffer[72:80].tolist() == list(range(40, 48))


def test_each_group_has_a_layout_of_its_own() -> None:
    """As a hybrid model's; their blocks may lie over one another."""
    config = make_cache(KINDS["GQA"], KVCacheLayout.LBNHC, 0).config
    (group,) = config.kv_cache_groups
    (tensor,) = config.kv_cache_tensors
    tensor.layers, other = tensor.layers[:2], type(tensor)(**vars(tensor))
    other.layers = ["layer.2"]
    config.kv_cache_tensors = [tensor, other]
    config.kv_cache_groups = [
        KVCacheGroupSpec(layer_names=list(names), kv_cache_spec=group.kv_cache_spec)
        for names in (tensor.layers, other.layers)
    ]
    first, second = block_layouts(config, KVCacheLayout.LBNHC, ("A", "B"))
    assert [layout.runs[0].num_runs for layout in (first, second)] == [2, 1]
    assert (first.backend, second.backend) == ("A", "B")


def test_what_cannot_be_copied_is_said() -> None:
    cache = make_cache(KINDS["GQA"], KVCacheLayout.LBNHC, 0)
    cache.config.kv_cache_tensors[0].host_resident = True
    with pytest.raises(ValueError, match="a way of its own"):
        open_blocks(cache.runner)
    cache.runner.kv_caches = []
    with pytest.raises(ValueError, match="no KV cache"):
        open_blocks(cache.runner)


def test_a_buffer_that_is_too_small() -> None:
    layout = make_cache(KINDS["GQA"], KVCacheLayout.LBNHC, 0).blocks.layout
    with pytest.raises(ValueError, match="ends before its blocks do"):
        KVBlocks(torch.zeros(1000), layout)
    with pytest.raises(ValueError, match="no layers"):
        KVBlocks(torch.zeros(1000), BlockLayout(name="L", num_blocks=1, runs=()))


@pytest.mark.parametrize("block_id", [-1, NUM_BLOCKS])
def test_a_block_that_there_is_not(block_id: int) -> None:
    kv = make_cache(KINDS["GQA"], KVCacheLayout.LBNHC, 0).blocks
    staging = torch.zeros(2 * kv.block_num_bytes, dtype=torch.uint8)
    with pytest.raises(IndexError):
        kv.gather([0, block_id], staging)
    with pytest.raises(IndexError):
        kv.scatter([0, block_id], staging)


@given(
    sizes=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    order=st.permutations(range(4)),
    padding=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    offset=st.integers(0, 5),
)
def test_runs_are_the_bytes_of_the_grid(
    sizes: list[int], order: list[int], padding: list[int], offset: int
) -> None:
    """Blocks lie along one axis of four, wherever it is, with gaps after any axis."""
    num_blocks, all_sizes = 3, [3, *sizes]
    strides, step = [0] * 4, 1
    for axis in order:
        strides[axis] = step
        step = step * all_sizes[axis] + padding[axis] * bool(step > 1)
    found = joined(
        runs_of(offset=offset, sizes=sizes, strides=strides[1:], block_stride=strides[0])
    )
    layout = BlockLayout(name="", num_blocks=num_blocks, runs=found)
    buffer = torch.zeros(max(runs.end(num_blocks) for runs in found), dtype=torch.uint8)
    kv = KVBlocks(buffer, layout)
    for block_id in range(num_blocks):
        kv.scatter([block_id], torch.full((layout.block_num_bytes,), 1 + block_id).byte())
    for block_id in range(num_blocks):
        expected = {
            offset
            + block_id * strides[0]
            + sum(i * s for i, s in zip(at, strides[1:], strict=True))
            for at in itertools.product(*map(range, sizes))
        }
        assert set((buffer == 1 + block_id).nonzero().flatten().tolist()) == expected
