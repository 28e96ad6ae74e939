"""Reading and writing KV-cache blocks: the bytes a migration moves.

A block's bytes are laid out layer after layer, so source and destination agree on them
whenever their ``layout`` strings are equal; nothing else is compared. Gather and scatter run
on whichever thread calls them: callers must only name blocks that no step writes meanwhile.

On a CPU numpy copies, with the one thread that calls. torch would start a team of threads beside
the engine's own, and they would wait for one another on cores that are taken.

On a GPU the copies have a stream of their own, beside that of the steps, and are over when the call
returns. They need not wait for a step: a block is copied only after the engine has read back the
tokens of the step that filled it, and used only after its scatter has returned. Not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

Rows = TypeVar("Rows", torch.Tensor, npt.NDArray[Any])

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
        # To make a view takes numpy a fifth of what it takes torch, and as long as a small copy.
        self._arrays = [] if self._stream is not None else [rows.numpy() for rows in self._rows]
        self.block_num_bytes = sum(rows[0].nbytes for rows in self._rows)
        self.layout = f"{len(kv_caches)}x{sorted(set(shapes))}"

    def gather(self, block_ids: Sequence[int], staging: torch.Tensor) -> None:
        """Copy blocks into ``staging``: uint8, at least ``len(block_ids) * block_num_bytes``.

        Raises:
            IndexError: if there is no such block.
        """
        if self._stream is None:
            ids = self._checked(block_ids)
            for array, out in _in_layers(self._arrays, len(block_ids), staging.numpy()):
                # Unlike "raise", "clip" writes straight to `out`.
                np.take(array, ids, axis=0, out=out, mode="clip")
            return
        with self._stream:
            on_device = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
            for rows, part in _in_layers(self._rows, len(block_ids), staging):
                if part.device == self.device:
                    torch.index_select(rows, 0, on_device, out=part)
                else:
                    part.copy_(rows.index_select(0, on_device), non_blocking=True)
        self._stream.synchronize()

    def scatter(self, block_ids: Sequence[int], staging: torch.Tensor) -> None:
        """The inverse of ``gather``, into the blocks named here."""
        if self._stream is None:
            ids = self._checked(block_ids)
            for array, written in _in_layers(self._arrays, len(block_ids), staging.numpy()):
                array[ids] = written
            return
        with self._stream:
            on_device = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
            for rows, part in _in_layers(self._rows, len(block_ids), staging):
                rows.index_copy_(0, on_device, part.to(self.device, non_blocking=True))
        self._stream.synchronize()

    def _checked(self, block_ids: Sequence[int]) -> npt.NDArray[np.int64]:
        if not all(0 <= block_id < self.num_blocks for block_id in block_ids):
            raise IndexError(f"not all of {block_ids} are of the {self.num_blocks} blocks")
        return np.array(block_ids, dtype=np.int64)


def _in_layers(
    layers: Sequence[Rows], num_blocks: int, staging: Rows
) -> Iterator[tuple[Rows, Rows]]:
    """The rows of each layer, and the part of ``staging`` that is for so many of them."""
    start = 0
    for rows in layers:
        end = start + num_blocks * rows[0].nbytes
        yield rows, staging[start:end].view(rows.dtype).reshape(num_blocks, -1)
        start = end


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
