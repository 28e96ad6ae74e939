"""The blocks of a stage as runs, each of one group: what a connection sends.

Knows the order of the groups' blocks (``core.migration.groups``), and no bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from llumsched.core.migration.groups import BlockOrder
from llumsched.core.migration.messages import CopyBlocks
from llumsched.engine.base import NO_BLOCK, BlockTables


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks of a request that follow one another in a group's table, from place ``first`` on."""

    group: int
    first: int
    block_ids: list[int]


def runs_of(
    order: BlockOrder, stage: CopyBlocks, tables: BlockTables, num_tokens: int
) -> list[Run]:
    """The blocks of a stage that have content.

    Args:
        tables: the request's blocks at its source.
        num_tokens: tokens that it has in blocks which nothing writes any more.
    """
    places = order.places(stage.first_block, stage.first_block + stage.num_blocks, num_tokens)
    runs: list[Run] = []
    for group, place in sorted(places):
        block_id = tables[group][place]
        if block_id == NO_BLOCK:
            continue
        last = runs[-1] if runs else None
        if last is not None and last.group == group and place == last.first + len(last.block_ids):
            last.block_ids.append(block_id)
        else:
            runs.append(Run(group, place, [block_id]))
    return runs
