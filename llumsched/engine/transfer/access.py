"""How a migrator reaches an engine's KV blocks, in whichever process they are.

Where an engine is one process its blocks are at hand. Where it has workers, each has a shard of
every block (``kv_shards``). Either way a part of a stage is one run of bytes in a slot of staging
memory, and one call copies all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from llumsched.engine.transfer.blocks import KVBlocks
from llumsched.engine.transfer.shared_ring import Staging


class KVAccess(Protocol):
    """``layout`` and ``backend`` are equal where blocks can move; ``block_num_bytes`` is the size
    of a block in a slot.

    ``pins_staging``: the copies are faster from and to memory that is locked for a GPU.
    ``copies_on_cores``: they take the cores that the steps compute on.
    Both calls raise ``RuntimeError`` if a worker cannot copy, or is gone.
    """

    @property
    def layout(self) -> str: ...

    @property
    def backend(self) -> str: ...

    @property
    def block_num_bytes(self) -> int: ...

    @property
    def pins_staging(self) -> bool: ...

    @property
    def copies_on_cores(self) -> bool: ...

    async def gather(self, block_ids: Sequence[int], staging: Staging) -> float:
        """Copy blocks into ``staging``, which has room for them.

        Returns:
            the seconds of a core's time that it took of other processes, where it took most.
        """

    async def scatter(self, block_ids: Sequence[int], staging: Staging) -> float:
        """The inverse of ``gather``, into the blocks named here."""

    def close(self) -> None:
        """Let go of what is held to reach them."""


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
