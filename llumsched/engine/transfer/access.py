"""How a migrator reaches an engine's KV blocks, in whichever process they are.

Where an engine is one process its blocks are at hand. Where it has workers, each has a shard of
every block (``shards``). Either way a part of a stage is one run of bytes in a slot of staging
memory, and one call copies all of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from llumsched.engine.transfer.blocks import KVBlocks, texts_of
from llumsched.engine.transfer.shared_ring import Staging


class LocalKV:
    """Blocks of this process, of each group. On a CPU the thread that calls copies them; on a GPU,
    where it would only wait, a thread for each direction does."""

    def __init__(self, groups: Sequence[KVBlocks]) -> None:
        self.groups = tuple(groups)
        self.layout, self.backend = texts_of(self.groups)
        self.block_num_bytes = tuple(blocks.block_num_bytes for blocks in self.groups)
        self.device = self.groups[0].device
        self.pins_staging = self.device.type == "cuda"
        self.copies_on_cores = self.device.type == "cpu"
        self._threads = (
            None
            if self.copies_on_cores
            else ThreadPoolExecutor(max_workers=2, thread_name_prefix="kv-copy")
        )

    async def gather(self, group: int, block_ids: Sequence[int], staging: Staging) -> float:
        return await self.run(lambda: self.groups[group].gather(block_ids, staging.content))

    async def scatter(self, group: int, block_ids: Sequence[int], staging: Staging) -> float:
        return await self.run(lambda: self.groups[group].scatter(block_ids, staging.content))

    async def run(self, copy: Callable[[], None]) -> float:
        """Copy, without holding up the caller's loop where nothing but a GPU is at work."""
        if self._threads is None:
            copy()
        else:
            await asyncio.get_running_loop().run_in_executor(self._threads, copy)
        return 0.0

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False)
