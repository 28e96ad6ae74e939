"""Which server has probably cached which beginning of a prompt, by what was sent to it.

A server drops what was used longest ago, when its cache is full; so does this.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class SentPrefixes:
    """Names of prefix blocks that one server has computed, at most `max_blocks` of them."""

    def __init__(self, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self._used: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._used)

    def compute(self, names: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Take in a prompt that the server computes: names that are new, and those dropped."""
        new = tuple(name for name in names if name not in self._used)
        # From the end: the beginning of a prompt is dropped last.
        for name in reversed(names):
            self._used[name] = None
            self._used.move_to_end(name)
        dropped = []
        while len(self._used) > self.max_blocks:
            dropped.append(self._used.popitem(last=False)[0])
        return tuple(name for name in new if name in self._used), tuple(dropped)

    def clear(self) -> None:
        """Forget all: the server has lost its cache."""
        self._used.clear()
