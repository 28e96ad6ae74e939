"""How a migrator reaches an engine's KV blocks, in whichever process they are.

Where an engine is one process its blocks are at hand. Where it has workers, each has a shard of
every block (``shards``). Either way a part of a stage is one run of bytes in a slot of staging
memory, and one call copies all of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from llumsched.engine.transfer.blocks import KVBlocks
from llumsched.engine.transfer.shared_ring import Staging


class LocalKV:
    """Blocks of this process. On a CPU the thread that calls copies them; on a GPU, where it would
    only wait, a thread for each direction does."""

    def __init__(self, blocks: KVBlocks) -> None:
        self.blocks = blocks
        self.layout = blocks.layout.text
        self.backend = blocks.layout.backend
        self.block_num_bytes = blocks.block_num_bytes
        self.device = blocks.device
        self.pins_staging = blocks.device.type == "cuda"
        self.copies_on_cores = blocks.device.type == "cpu"
        self._threads = (
            None
            if self.copies_on_cores
            else ThreadPoolExecutor(max_workers=2, thread_name_prefix="kv-copy")
        )

    async def gather(self, block_ids: Sequence[int], staging: Staging) -> float:
        return await self.run(lambda: self.blocks.gather(block_ids, staging.content))

    async def scatter(self, block_ids: Sequence[int], staging: Staging) -> float:
        return await self.run(lambda: self.blocks.scatter(block_ids, staging.content))

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
