"""The fake engine's KV cache: blocks with reference counts, content and a prefix cache.

A cell holds the token whose KV it stands for. Invariant: a block whose content may be shared or
re-used is never written, and a block that is given out has lost what it held before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

BlockContent = tuple[int | None, ...]


class FakeBlockPool:
    """``num_blocks`` blocks; a free one keeps its content, for the prefix cache, until re-used."""

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._free = deque(range(num_blocks))
        self._num_holders = [0] * num_blocks
        self._cells: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self._prefix_of: dict[int, tuple[int, ...]] = {}
        self._block_of: dict[tuple[int, ...], int] = {}

    @property
    def num_blocks(self) -> int:
        return len(self._num_holders)

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Blocks without content; None, and no change, if there are too few."""
        if num_blocks > len(self._free):
            return None
        block_ids = [self._free.popleft() for _ in range(num_blocks)]
        for block_id in block_ids:
            prefix = self._prefix_of.pop(block_id, None)
            if prefix is not None:
                del self._block_of[prefix]
            self._cells[block_id] = [None] * self.block_size
            self._num_holders[block_id] = 1
        return block_ids

    def touch(self, block_ids: Sequence[int]) -> None:
        """Become one more holder of each."""
        for block_id in block_ids:
            if self._num_holders[block_id] == 0:
                self._free.remove(block_id)
            self._num_holders[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Stop being a holder of each."""
        for block_id in block_ids:
            if self._num_holders[block_id] == 0:
                raise AssertionError(f"block {block_id} is freed by one who does not hold it")
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id] == 0:
                self._free.append(block_id)

    def cached_prefix(self, token_ids: Sequence[int]) -> list[int]:
        """The blocks that hold the full blocks of ``token_ids``, as far as they are known."""
        block_ids: list[int] = []
        for end in range(self.block_size, len(token_ids) + 1, self.block_size):
            block_id = self._block_of.get(tuple(token_ids[:end]))
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def publish(self, block_ids: Sequence[int], token_ids: Sequence[int]) -> None:
        """Make known that the blocks hold the first full blocks of ``token_ids``."""
        for index, block_id in enumerate(block_ids):
            prefix = tuple(token_ids[: (index + 1) * self.block_size])
            if block_id not in self._prefix_of and prefix not in self._block_of:
                self._prefix_of[block_id] = prefix
                self._block_of[prefix] = block_id

    def write(self, block_ids: Sequence[int], position: int, token_id: int) -> None:
        block_id = block_ids[position // self.block_size]
        self._check_writable(block_id)
        self._cells[block_id][position % self.block_size] = token_id

    def read(self, block_ids: Sequence[int], num_tokens: int) -> list[int]:
        """The content of the first ``num_tokens`` positions; every one must have been written."""
        content: list[int] = []
        for position in range(num_tokens):
            cell = self._cells[block_ids[position // self.block_size]][position % self.block_size]
            if cell is None:
                raise AssertionError(f"position {position} is read and was never written")
            content.append(cell)
        return content

    def content(self, block_id: int) -> BlockContent:
        return tuple(self._cells[block_id])

    def set_content(self, block_id: int, content: BlockContent) -> None:
        self._check_writable(block_id)
        self._cells[block_id] = list(content)

    def check(self, held: Sequence[int]) -> None:
        """``held`` names each block once for each of its holders."""
        num_holders = [0] * self.num_blocks
        for block_id in held:
            num_holders[block_id] += 1
        if num_holders != self._num_holders:
            raise AssertionError(f"blocks count {self._num_holders} holders and have {num_holders}")
        num_unheld = num_holders.count(0)
        if len(self._free) != num_unheld:
            raise AssertionError(f"{len(self._free)} blocks are free, {num_unheld} have no holder")

    def _check_writable(self, block_id: int) -> None:
        if self._num_holders[block_id] == 0:
            raise AssertionError(f"block {block_id} is written and nobody holds it")
        if block_id in self._prefix_of:
            raise AssertionError(f"block {block_id} is written and is known as a cached prefix")


class FakeKVCache:
    """Copying blocks; the staging memory is a list."""

    def __init__(self, pool: FakeBlockPool) -> None:
        self._pool = pool

    def gather(self, block_ids: Sequence[int], staging: list[BlockContent]) -> None:
        staging[:] = [self._pool.content(block_id) for block_id in block_ids]

    def scatter(self, block_ids: Sequence[int], staging: list[BlockContent]) -> None:
        for block_id, content in zip(block_ids, staging, strict=True):
            self._pool.set_content(block_id, content)
