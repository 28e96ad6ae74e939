"""Room is reserved for what a request decodes while it waits for a step of the destination."""

from __future__ import annotations

from pathlib import Path

import pytest

from llumsched.engine.base import StepAhead
from llumsched.engine.vllm.migration.groups import RESERVED_GROWTH_BLOCKS
from tests.engine.scheduled import BLOCK_SIZE, NUM_BLOCKS, Engine, engine_config

PROMPT = list(range(300, 340))
NUM_TOKENS = 400
NUM_BLOCKS_NOW = 3
# Two steps of the destination last as long as so many tokens at the source.
NUM_WAITED_BLOCKS = 12
LONG_STEP = StepAhead(ends_in_s=1.0, step_s=NUM_WAITED_BLOCKS * BLOCK_SIZE * 0.01 / 2)


def reserve(tmp_path: Path, *, max_tokens: int = NUM_TOKENS, num_free: int = NUM_BLOCKS - 1) -> int:
    """Blocks that are reserved for a request of three blocks."""
    here, there = Engine(engine_config(tmp_path)), Engine(engine_config(tmp_path))
    here.submit("a", PROMPT, max_tokens)
    here.until("a", 2)
    here.step_time_s, there.ahead = 0.01, LONG_STEP
    there.scheduler.kv_cache_manager.block_pool.get_new_blocks(there.num_free_blocks - num_free)
    reserved = there.port.reserve(here.port.start_export("a"))
    (block_ids,) = reserved.block_ids
    assert num_free - there.num_free_blocks == len(block_ids)
    return len(block_ids)


@pytest.mark.parametrize(
    ("max_tokens", "num_more"),
    [
        pytest.param(NUM_TOKENS, NUM_WAITED_BLOCKS, id="as much as it decodes"),
        pytest.param(2 + 3 * BLOCK_SIZE, 3, id="no more than its answer"),
    ],
)
def test_a_long_step_is_long_at_the_source_too(
    tmp_path: Path, max_tokens: int, num_more: int
) -> None:
    num_blocks = reserve(tmp_path, max_tokens=max_tokens)
    assert num_blocks == NUM_BLOCKS_NOW + RESERVED_GROWTH_BLOCKS + num_more


def test_where_there_is_not_that_much_room_it_comes_all_the_same(tmp_path: Path) -> None:
    num_blocks = reserve(tmp_path, num_free=NUM_BLOCKS_NOW + NUM_WAITED_BLOCKS)
    assert num_blocks == NUM_BLOCKS_NOW + RESERVED_GROWTH_BLOCKS
