"""The groups of a KV cache, and the order in which a request's blocks of all groups are copied.

Layers that keep their KV in the same way form a group, and a request has blocks of each. Those of
a *settled* group are filled in order and not written again once they are full: each can be copied
as soon as it is full. A *live* group holds a state that every step rewrites (Mamba, linear
attention, short convolutions): its blocks go with the last stage, when the request stands still.

The order is one for all groups, so that "the first n blocks" means the same at both ends: full
blocks by the token that fills them, and where one token fills several, by group; then, once the
request is suspended, the blocks that are not full; then the live ones. A sliding window leaves
blocks behind: they keep their place in the order, and have no content to copy.

Invariant: what is settled at some number of tokens comes first at every higher one. Knows neither
bytes nor block ids.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroup:
    """One group: `block_size` tokens a block, or `num_live_blocks` blocks that hold a state."""

    block_size: int
    num_live_blocks: int = 0

    @property
    def is_live(self) -> bool:
        """True if every step rewrites what the group holds of a request."""
        return self.num_live_blocks > 0


Place = tuple[int, int]
"""A group's number, and a block's place in the request's table of that group."""


class BlockOrder:
    """The order of a request's blocks, for a cache of these groups."""

    def __init__(self, groups: Sequence[CacheGroup]) -> None:
        self.groups = tuple(groups)
        self._settled = [(i, g.block_size) for i, g in enumerate(self.groups) if not g.is_live]
        self._live = [
            (i, n) for i, group in enumerate(self.groups) for n in range(group.num_live_blocks)
        ]
        # After so many tokens the order of settled blocks repeats itself.
        self.period = math.lcm(*(size for _, size in self._settled)) if self._settled else 1
        ends = sorted(
            ((place + 1) * size, group, place)
            for group, size in self._settled
            for place in range(self.period // size)
        )
        self._of_period: list[Place] = [(group, place) for _, group, place in ends]

    def num_settled(self, num_tokens: int) -> int:
        """Blocks that are full and of settled groups when a request has so many tokens."""
        return sum(num_tokens // size for _, size in self._settled)

    def num_blocks(self, num_tokens: int) -> int:
        """All blocks of a request that stands still at so many tokens."""
        if num_tokens <= 0:
            return 0
        return sum(-(-num_tokens // size) for _, size in self._settled) + len(self._live)

    def places(self, first: int, last: int, num_tokens: int) -> list[Place]:
        """Where the blocks `first` to `last`, without it, are, of a request of so many tokens.

        Raises:
            IndexError: if there are no such blocks.
        """
        num_settled = self.num_settled(num_tokens)
        places = [self._place(index) for index in range(first, min(last, num_settled))]
        if last > num_settled:
            rest = [(g, num_tokens // size) for g, size in self._settled if num_tokens % size]
            rest += self._live
            if last - num_settled > len(rest):
                raise IndexError(f"{num_tokens} tokens have no block {last - 1}")
            places += rest[max(0, first - num_settled) : last - num_settled]
        return places

    def _place(self, index: int) -> Place:
        periods, rest = divmod(index, len(self._of_period))
        group, place = self._of_period[rest]
        return group, periods * (self.period // self.groups[group].block_size) + place


@functools.cache
def order_of(groups: tuple[CacheGroup, ...]) -> BlockOrder:
    """The order for these groups."""
    return BlockOrder(groups)
