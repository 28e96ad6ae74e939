"""The fake engine with its KV cache in a tensor, on a CPU or a GPU, as a real engine has it.

A cell is a token in each of several layers, so a block that arrives without one layer, or in other
bytes, is found when it is read. Migrators move its blocks as they move those of an engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llumsched.engine.transfer.access import LocalKV
from llumsched.engine.transfer.blocks import BlockLayout, KVBlocks, Runs
from tests.fake_engine.blocks import FakeBlockPool
from tests.fake_engine.engine import FakeEngine
from tests.fake_engine.request import VOCABULARY_SIZE

NUM_LAYERS = 3
WORD_NUM_BYTES = 8


class TensorBlockPool(FakeBlockPool):
    """``tensor`` holds layer, block, position; 0 is a cell that nothing has written."""

    def __init__(self, *, num_blocks: int, block_size: int, device: torch.device) -> None:
        super().__init__(num_blocks=num_blocks, block_size=block_size)
        self.tensor = torch.zeros(
            NUM_LAYERS, num_blocks, block_size, dtype=torch.int64, device=device
        )
        self._first = 1 + VOCABULARY_SIZE * torch.arange(NUM_LAYERS, device=device)

    def allocate(self, num_blocks: int) -> list[int] | None:
        block_ids = super().allocate(num_blocks)
        if block_ids:
            self.tensor[:, block_ids] = 0
        return block_ids

    def write(self, block_ids: Sequence[int], position: int, token_id: int) -> None:
        block_id = block_ids[position // self.block_size]
        self._check_writable(block_id)
        self.tensor[:, block_id, position % self.block_size] = self._first + token_id

    def read(self, block_ids: Sequence[int], num_tokens: int) -> list[int]:
        cells = self.tensor[:, list(block_ids)].reshape(NUM_LAYERS, -1)[:, :num_tokens]
        tokens = cells - self._first[:, None]
        if not bool((tokens == tokens[0]).all()) or not bool((tokens >= 0).all()):
            raise AssertionError("a cell is read that was never written, or not in every layer")
        return [int(token) for token in tokens[0].tolist()]


class TensorEngine(FakeEngine):
    """A ``FakeEngine`` whose ``kv`` can be copied by a migrator."""

    def __init__(self, *, num_blocks: int, block_size: int, device: torch.device) -> None:
        super().__init__(num_blocks=num_blocks, block_size=block_size)
        pool = TensorBlockPool(num_blocks=num_blocks, block_size=block_size, device=device)
        self.pool = pool
        page_num_bytes = block_size * WORD_NUM_BYTES
        runs = Runs(
            offset=0,
            num_runs=NUM_LAYERS,
            run_stride=num_blocks * page_num_bytes,
            block_stride=page_num_bytes,
            run_num_bytes=page_num_bytes,
        )
        layout = BlockLayout(name="cells", num_blocks=num_blocks, runs=(runs,), backend="fake")
        self._kv = LocalKV([KVBlocks(pool.tensor, layout)])

    @property
    def kv(self) -> LocalKV:
        return self._kv

    def fingerprint(self) -> str:
        return f"fake: {self._kv.layout}"
