"""The order in which the blocks of several groups are copied."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumsched.core.migration.groups import BlockOrder, CacheGroup
from llumsched.core.migration.messages import CopyBlocks
from llumsched.core.migration.source.machine import advance, start
from llumsched.core.migration.source.record import MigrationOptions
from llumsched.engine.base import NO_BLOCK
from llumsched.migration.runs import Run, runs_of
from tests.migration_table.test_source import reserved

FULL = CacheGroup(block_size=4)
LARGE = CacheGroup(block_size=6)
STATE = CacheGroup(block_size=100, num_live_blocks=1)

groups_of_a_cache = st.lists(
    st.builds(
        CacheGroup, block_size=st.integers(1, 12), num_live_blocks=st.sampled_from([0, 0, 0, 1, 2])
    ),
    min_size=1,
    max_size=4,
)


def test_full_blocks_by_the_token_that_fills_them() -> None:
    order = BlockOrder([FULL, LARGE])
    # Filled by the tokens 4, 6, 8, 12 and 12.
    assert order.places(0, 5, 13) == [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1)]
    assert [order.num_settled(n) for n in (3, 4, 6, 11, 12)] == [0, 1, 2, 3, 5]


def test_tails_and_then_states_come_last() -> None:
    order = BlockOrder([STATE, FULL, LARGE])
    assert order.num_settled(13) == 5
    assert order.num_blocks(13) == 8
    assert order.places(5, 8, 13) == [(1, 3), (2, 2), (0, 0)]
    assert order.places(5, 6, 12) == [(0, 0)]
    assert order.num_blocks(0) == 0


def test_states_alone() -> None:
    order = BlockOrder([STATE])
    assert (order.num_settled(1000), order.num_blocks(1000)) == (0, 1)
    assert order.places(0, 1, 1000) == [(0, 0)]


def test_blocks_that_are_not_there() -> None:
    with pytest.raises(IndexError, match="9 tokens have no block 5"):
        BlockOrder([FULL, LARGE]).places(0, 6, 9)


@given(groups_of_a_cache, st.integers(1, 60), st.integers(0, 60))
def test_what_is_settled_comes_first_for_ever(
    groups: list[CacheGroup], num_tokens: int, more: int
) -> None:
    order = BlockOrder(groups)
    num_settled = order.num_settled(num_tokens)
    settled = order.places(0, num_settled, num_tokens)
    assert settled == order.places(0, num_settled, num_tokens + more)
    assert not any(groups[group].is_live for group, _ in settled)
    everything = order.places(0, order.num_blocks(num_tokens), num_tokens)
    expected = {
        (i, place)
        for i, group in enumerate(groups)
        for place in range(group.num_live_blocks or -(-num_tokens // group.block_size))
    }
    assert len(everything) == len(expected)
    assert set(everything) == expected


def test_runs_are_of_one_group_and_leave_out_what_a_window_left_behind() -> None:
    order = BlockOrder([FULL, FULL, STATE])
    stage = CopyBlocks(migration_id="m", stage=1, first_block=2, num_blocks=7)
    tables = ([10, 11, 12, 13], [NO_BLOCK, NO_BLOCK, 22, 23], [30])
    assert runs_of(order, stage, tables, 14) == [
        Run(0, 1, [11, 12, 13]),
        Run(1, 2, [22, 23]),
        Run(2, 0, [30]),
    ]


def test_limits_of_the_last_stage_are_those_of_each_group() -> None:
    """A token that fills a block fills one in each settled group."""
    for groups, num_left, is_little in (
        ((FULL,), 1, True),
        ((FULL,), 2, False),
        ((FULL, FULL, STATE), 2, True),
        ((FULL, FULL, STATE), 3, False),
        ((STATE,), 0, True),
    ):
        migration, _ = start(
            migration_id="m",
            request_id="r",
            source="a",
            destination="b",
            num_preemptions=0,
            groups=groups,
            options=MigrationOptions(final_stage_blocks=1),
        )
        after, _ = advance(migration, reserved(num_cached=0, num_full=num_left))
        assert (after.state == "SUSPENDING") is is_little
