"""Reading and writing KV-cache blocks: the bytes a migration moves.

A block's bytes are laid out layer after layer, so source and destination agree on them
whenever their ``layout`` strings are equal; nothing else is compared. Gather and scatter run
on whichever thread calls them: callers must only name blocks that no step writes meanwhile.

On a GPU the copies have a stream of their own, beside that of the steps, and are over when the call
returns. They need not wait for a step: a block is copied only after the engine has read back the
tokens of the step that filled it, and used only after its scatter has returned. Not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

WORD = 8  # bytes


class KVBlocks:
    """The KV cache of one worker, seen as ``num_blocks`` rows of bytes in each layer.

    Args:
        kv_caches: one tensor a layer, in the model runner's order.
        num_blocks: number of blocks of the pool, the null block included.

    Raises:
        ValueError: if the blocks of a layer are not one contiguous row of bytes each.
    """

    def __init__(self, kv_caches: Sequence[torch.Tensor], num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._rows: list[torch.Tensor] = []
        shapes = []
        for kv_cache in kv_caches:
            shapes.append((tuple(kv_cache.shape[1:]), str(kv_cache.dtype)))
            for part in _split_by_block(kv_cache, num_blocks):
                rows = part.view(torch.uint8).view(num_blocks, -1)
                # Copied by the element, so the fewer elements the better.
                self._rows.append(rows.view(torch.int64) if rows.shape[1] % WORD == 0 else rows)
        self.device = self._rows[0].device
        self._stream = None if self.device.type == "cpu" else torch.Stream(device=self.device)
        self.block_num_bytes = sum(rows[0].nbytes for rows in self._rows)
        self.layout = f"{len(kv_caches)}x{sorted(set(shapes))}"

    def gather(self, block_ids: Sequence[int], staging: torch.Tensor) -> None:
        """Copy blocks into ``staging``: uint8, at least ``len(block_ids) * block_num_bytes``."""
        with self._copying():
            ids = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
            for rows, part in zip(self._rows, self._parts(len(block_ids), staging), strict=True):
                if part.device == self.device:
                    torch.index_select(rows, 0, ids, out=part)
                else:
                    part.copy_(rows.index_select(0, ids), non_blocking=True)

    def scatter(self, block_ids: Sequence[int], staging: torch.Tensor) -> None:
        """The inverse of ``gather``, into the blocks named here."""
        with self._copying():
            ids = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
            for rows, part in zip(self._rows, self._parts(len(block_ids), staging), strict=True):
                rows.index_copy_(0, ids, part.to(self.device, non_blocking=True))

    @contextmanager
    def _copying(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with self._stream:
            yield
        self._stream.synchronize()

    def _parts(self, num_blocks: int, staging: torch.Tensor) -> list[torch.Tensor]:
        parts = []
        start = 0
        for rows in self._rows:
            num_bytes = num_blocks * rows[0].nbytes
            part = staging[start : start + num_bytes]
            parts.append(part.view(rows.dtype).view(num_blocks, rows.shape[1]))
            start += num_bytes
        return parts


def _split_by_block(kv_cache: torch.Tensor, num_blocks: int) -> list[torch.Tensor]:
    """Views of ``kv_cache`` whose first dimension is the block, each contiguous."""
    if kv_cache.shape[0] == num_blocks:
        parts = [kv_cache]
    elif kv_cache.dim() > 1 and kv_cache.shape[1] == num_blocks:
        parts = list(kv_cache.unbind(0))  # keys and values kept apart
    else:
        parts = []
    if not parts or not all(part.is_contiguous() for part in parts):
        raise ValueError(
            f"KV cache of shape {tuple(kv_cache.shape)} and strides {kv_cache.stride()} is not "
            f"{num_blocks} contiguous blocks; this attention backend's layout cannot migrate."
        )
    return parts
