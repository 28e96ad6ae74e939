"""How a migrator reaches an engine's KV blocks, in whichever process they are.

Where an engine is one process its blocks are at hand. Where it has workers, each has a shard of
every block (``kv_shards``). Either way a part of a stage is one run of bytes in a slot of staging
memory, and one call copies all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from llumsched.engine.transfer.blocks import KVBlocks
from llumsched.engine.transfer.shared_ring import Staging


class LocalKV:
    """Blocks of this process, copied by the thread that calls."""

    def __init__(self, blocks: KVBlocks) -> None:
        self.blocks = blocks
        self.layout = blocks.layout.text
        self.backend = blocks.layout.backend
        self.block_num_bytes = blocks.block_num_bytes
        self.pins_staging = blocks.device.type == "cuda"
        self.copies_on_cores = blocks.device.type == "cpu"

    async def gather(self, block_ids: Sequence[int], staging: Staging) -> float:
        self.blocks.gather(block_ids, staging.content)
        return 0.0

    async def scatter(self, block_ids: Sequence[int], staging: Staging) -> float:
        self.blocks.scatter(block_ids, staging.content)
        return 0.0

    def close(self) -> None:
        """Nothing is held."""
