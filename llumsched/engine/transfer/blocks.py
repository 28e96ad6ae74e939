"""The blocks of a KV cache as runs of bytes, and copying them: what a migration moves.

An engine keeps the KV cache of a worker in one buffer. Where the bytes of a block lie in it is
described by ``BlockLayout``, in bytes alone: heads, tokens and data types do not matter to a copy.
Staged blocks lie kind after kind and run after run, so two instances agree on staged bytes if the
texts of their layouts are equal. Strides may differ: they depend on the number of blocks.

Callers name only blocks that no step writes meanwhile. On a CPU numpy copies, with the thread that
calls: torch would start a team of threads beside the engine's own, and they would wait for one
another on cores that are taken. On a GPU one kernel gathers the runs of a kind, one copy takes all
to the host, and both have a stream of their own beside that of the steps. Not run on a GPU.

Knows neither attention nor vLLM (``engine.vllm.kv`` describes vLLM's buffers).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

Rows = TypeVar("Rows", torch.Tensor, npt.NDArray[Any])

# Copied by the element, so the fewer elements the better.
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """Equal runs of bytes of every block, an equal distance apart.

    Run ``r`` of block ``b`` begins ``offset + r * run_stride + b * block_stride`` bytes into the
    buffer and has ``run_num_bytes`` bytes.
    """

    offset: int
    num_runs: int
    run_stride: int
    block_stride: int
    run_num_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of one block, over all its runs."""
        return self.num_runs * self.run_num_bytes

    def end(self, num_blocks: int) -> int:
        """The byte after the last one of the last block."""
        last_run = self.offset + (self.num_runs - 1) * self.run_stride
        return last_run + (num_blocks - 1) * self.block_stride + self.run_num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """Where the blocks of one KV cache group lie in a worker's buffer.

    Args:
        name: the engine's name of the layout.
        num_blocks: number of blocks of the pool, the null block included.
        runs: one entry a kind of layers, in the order in which they are staged.
        backend: the attention backends that give the bytes their meaning.
    """

    name: str
    num_blocks: int
    runs: tuple[Runs, ...]
    backend: str = ""

    @property
    def block_num_bytes(self) -> int:
        """Bytes of one block, over all layers."""
        return sum(runs.num_bytes for runs in self.runs)

    @property
    def text(self) -> str:
        """Name and runs: equal on two instances if the bytes of a block are."""
        kinds = " + ".join(f"{runs.num_runs} x {runs.run_num_bytes}" for runs in self.runs)
        return f"{self.name}: {kinds} bytes"


def runs_of(
    *, offset: int, sizes: Sequence[int], strides: Sequence[int], block_stride: int
) -> list[Runs]:
    """The longest runs of a block whose bytes form a grid.

    Args:
        offset: where the first byte of block 0 lies, in bytes.
        sizes: number of steps along each axis of the grid, in any order; the innermost counts
            bytes.
        strides: bytes between two steps along each axis.
        block_stride: bytes between two blocks.
    """
    axes = sorted((stride, size) for stride, size in zip(strides, sizes, strict=True) if size > 1)
    run_num_bytes = 1
    while axes and axes[0][0] == run_num_bytes:
        run_num_bytes *= axes.pop(0)[1]
    run_stride, num_runs = axes.pop(0) if axes else (run_num_bytes, 1)
    while axes and axes[0][0] == run_stride * num_runs:
        num_runs *= axes.pop(0)[1]
    offsets = [offset]
    for stride, size in axes:
        offsets = [begin + step * stride for step in range(size) for begin in offsets]
    return [
        Runs(
            offset=begin,
            num_runs=num_runs,
            run_stride=run_stride,
            block_stride=block_stride,
            run_num_bytes=run_num_bytes,
        )
        for begin in offsets
    ]


def joined(kinds: Sequence[Runs]) -> tuple[Runs, ...]:
    """The same bytes, with runs that follow one another in every block made into one."""
    found: list[Runs] = []
    for runs in kinds:
        last = found[-1] if found else None
        if (
            last is not None
            and last.num_runs == runs.num_runs == 1
            and last.block_stride == runs.block_stride
            and last.offset + last.run_num_bytes == runs.offset
        ):
            num_bytes = last.run_num_bytes + runs.run_num_bytes
            found[-1] = Runs(
                offset=last.offset,
                num_runs=1,
                run_stride=num_bytes,
                block_stride=runs.block_stride,
                run_num_bytes=num_bytes,
            )
        else:
            found.append(runs)
    return tuple(found)


def texts_of(groups: Sequence[KVBlocks]) -> tuple[str, str]:
    """Layout and backends of all groups, as texts that are equal where their blocks can move."""
    layouts = " / ".join(blocks.layout.text for blocks in groups)
    return layouts, " / ".join(blocks.layout.backend for blocks in groups)


class KVBlocks:
    """The blocks of one KV cache group of one worker.

    Args:
        buffer: any tensor in the memory that ``layout`` describes. Its whole storage is meant.

    Raises:
        ValueError: if the buffer is smaller than ``layout`` says, or there is nothing to copy.
    """

    def __init__(self, buffer: torch.Tensor, layout: BlockLayout) -> None:
        if not layout.runs:
            raise ValueError("the KV cache has no layers that could move")
        self.layout = layout
        self.num_blocks = layout.num_blocks
        self.block_num_bytes = layout.block_num_bytes
        self.device = buffer.device
        self.buffer = torch.empty(0, dtype=torch.uint8, device=buffer.device)
        self.buffer.set_(buffer.untyped_storage())
        needed = max(runs.end(layout.num_blocks) for runs in layout.runs)
        if needed > self.buffer.nbytes:
            raise ValueError(
                f"the KV cache of {self.buffer.nbytes} bytes ends before its blocks do ({needed})"
            )
        self._rows = _rows(self.buffer, layout)
        # To make a view takes numpy a fifth of what it takes torch, and as long as a small copy.
        self._arrays = [rows.numpy() for rows in self._rows] if self._is_on_cpu else []
        self._out = None if self._is_on_cpu else _Lane(self.device)
        self._in = None if self._is_on_cpu else _Lane(self.device)

    @property
    def _is_on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def gather(self, block_ids: Sequence[int], staging: torch.Tensor) -> None:
        """Copy blocks into ``staging``: uint8, at least ``len(block_ids) * block_num_bytes`` long,
        on the host or on the device of the blocks.

        Raises:
            IndexError: if there is no such block.
        """
        self._check(block_ids)
        if not block_ids:
            return
        if self._out is None:
            for array, part in _in_kinds(self._arrays, len(block_ids), staging.numpy()):
                if array.flags.c_contiguous:
                    # Unlike "raise", "clip" writes straight to `out`.
                    np.take(array, block_ids, axis=1, out=part, mode="clip")
                    continue
                for index, block_id in enumerate(block_ids):
                    part[:, index] = array[:, block_id]
            return
        staging = staging[: len(block_ids) * self.block_num_bytes]
        with self._out as lane:
            ids = lane.indices(block_ids)
            near = staging if staging.device == self.device else lane.staging(staging.nbytes)
            for rows, out in _in_kinds(self._rows, len(block_ids), near):
                torch.index_select(rows, 1, ids, out=out)
            if near is not staging:
                staging.copy_(near, non_blocking=True)

    def scatter(self, block_ids: Sequence[int], staging: torch.Tensor) -> None:
        """The inverse of ``gather``, into the blocks named here."""
        self._check(block_ids)
        if not block_ids:
            return
        if self._in is None:
            for array, part in _in_kinds(self._arrays, len(block_ids), staging.numpy()):
                for run, written in zip(array, part, strict=True):
                    run[block_ids] = written
            return
        staging = staging[: len(block_ids) * self.block_num_bytes]
        with self._in as lane:
            ids = lane.indices(block_ids)
            near = staging
            if staging.device != self.device:
                near = lane.staging(staging.nbytes)
                near.copy_(staging, non_blocking=True)
            for rows, written in _in_kinds(self._rows, len(block_ids), near):
                rows.index_copy_(1, ids, written)

    def _check(self, block_ids: Sequence[int]) -> None:
        # On a GPU an index out of range would end the process's CUDA context.
        if not all(0 <= block_id < self.num_blocks for block_id in block_ids):
            raise IndexError(f"not all of {block_ids} are of the {self.num_blocks} blocks")


class _Lane:
    """Copies in one direction on a GPU: a stream, and memory beside the blocks. One at a time.

    When the ``with`` ends, the copies are over: other threads run while it waits for them. The
    copies need not wait for a step: a block is copied only after the engine has read back the
    tokens of the step that filled it, and used only after its scatter has returned.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device=device)
        self._lock = threading.Lock()
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def __enter__(self) -> _Lane:
        self._lock.acquire()
        self._stream.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        try:
            self._stream.__exit__(*raised)
            self._stream.synchronize()
        finally:
            self._lock.release()

    def indices(self, block_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(block_ids, dtype=torch.int64, device=self._device)

    def staging(self, num_bytes: int) -> torch.Tensor:
        """Memory on the device, kept for the next part."""
        if self._memory.nbytes < num_bytes:
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        return self._memory[:num_bytes]


def _rows(buffer: torch.Tensor, layout: BlockLayout) -> list[torch.Tensor]:
    """A view of each kind: run, block, word."""
    distances = (
        distance
        for runs in layout.runs
        for distance in (runs.offset, runs.run_stride, runs.block_stride, runs.run_num_bytes)
    )
    # One word for all kinds: each begins in staging memory where the one before it ends.
    word = math.gcd(max(WORDS), *distances)
    words = buffer[: buffer.nbytes // word * word].view(WORDS[word])
    return [
        words.as_strided(
            (runs.num_runs, layout.num_blocks, runs.run_num_bytes // word),
            (runs.run_stride // word, runs.block_stride // word, 1),
            runs.offset // word,
        )
        for runs in layout.runs
    ]


def _in_kinds(kinds: Sequence[Rows], num_blocks: int, staging: Rows) -> Iterator[tuple[Rows, Rows]]:
    """The rows of each kind, and the part of ``staging`` that is for so many blocks of them."""
    start = 0
    for rows in kinds:
        num_runs, words = rows.shape[0], rows.shape[2]
        end = start + num_runs * num_blocks * words * rows.itemsize
        yield rows, staging[start:end].view(rows.dtype).reshape(num_runs, num_blocks, words)
        start = end
