"""Blocks that the destination reads out of the source's KV cache: between GPUs of one host.

vLLM keeps the KV cache of a worker in one allocation. The source shares it once, by a handle of
CUDA IPC; the destination maps it and copies blocks from it to its own, over NVLink, PCIe or inside
one GPU. No byte passes host memory, and nothing is gathered at the source.

Not run: there was no GPU. What has run is all but the sharing itself, between two caches in the
memory of one process. From the documentation of CUDA and torch: memory that is paged by
``expandable_segments`` or unmapped by a sleeping engine cannot be shared; two GPUs need peer
access; the handle is opened on the destination's own GPU, for Ray shows an instance no others. What
cannot be shared or mapped is declined, and blocks go by shared memory. Tensor parallelism is not
supported: there the blocks are those of the workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from llumsched.engine.transfer.access import LocalKV
from llumsched.engine.transfer.blocks import BlockLayout, KVBlocks, Runs
from llumsched.engine.transfer.shared_ring import host_id
from llumsched.engine.transfer.transport import (
    Here,
    IncomingPart,
    OutgoingPart,
    Transport,
    Unavailable,
    Write,
)


class Handle(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``torch.UntypedStorage._share_cuda_`` on an allocation, in its order."""

    device: int
    memory: bytes
    num_bytes: int
    offset: int
    ref_counter: bytes
    ref_counter_offset: int
    event: bytes
    waits_for_event: bool


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """The source's allocation, and where the blocks are in it."""

    host: str
    handle: Handle
    name: str
    num_blocks: int
    groups: tuple[tuple[Runs, ...], ...]


def share(buffer: torch.Tensor) -> Handle:
    """A handle by which another process of the host can map the buffer's memory.

    Raises:
        Unavailable: if it cannot be shared.
    """
    if buffer.device.type != "cuda":
        raise Unavailable("the blocks are in no GPU's memory")
    storage: Any = buffer.untyped_storage()
    try:
        return Handle(**dict(zip(Handle.__struct_fields__, storage._share_cuda_(), strict=True)))
    except RuntimeError as error:
        raise Unavailable(f"CUDA cannot share the memory of the blocks: {error}") from error


def mapped(handle: Handle, device: torch.device) -> torch.Tensor:
    """The memory of another process, as bytes.

    Raises:
        Unavailable: if it cannot be mapped.
    """
    if device.type != "cuda":
        raise Unavailable("the blocks are in no GPU's memory")
    storage_class: Any = torch.UntypedStorage
    _theirs, *rest = msgspec.structs.astuple(handle)
    try:
        storage = storage_class._new_shared_cuda(device.index or 0, *rest)
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    except RuntimeError as error:
        raise Unavailable(f"CUDA cannot map the memory of the source: {error}") from error


class CudaIpc(Transport):
    """The source names blocks, the destination copies them."""

    name = "cuda_ipc"
    _theirs: tuple[KVBlocks, ...]

    def __init__(self, here: Here) -> None:
        super().__init__(here)
        if not isinstance(here.kv, LocalKV):
            raise Unavailable("the blocks are in the memory of the instance's workers")
        if here.checksum:
            raise Unavailable("the bytes pass nobody who could add a checksum")
        self._kv = here.kv

    def offer(self) -> bytes:
        blocks = self._kv.groups[0]
        return msgspec.msgpack.encode(
            Offer(
                host=host_id(),
                handle=share(blocks.buffer),
                name=blocks.layout.name,
                num_blocks=blocks.num_blocks,
                groups=tuple(group.layout.runs for group in self._kv.groups),
            )
        )

    async def accept(self, offer: bytes) -> bytes:
        try:
            theirs = msgspec.msgpack.decode(offer, type=Offer)
        except msgspec.DecodeError as error:
            raise Unavailable(f"the offer makes no sense: {error}") from error
        if theirs.host != host_id():
            raise Unavailable("the source is on another host")
        layouts = [
            BlockLayout(name=theirs.name, num_blocks=theirs.num_blocks, runs=runs)
            for runs in theirs.groups
        ]
        text = " / ".join(layout.text for layout in layouts)
        if text != self._kv.layout:
            raise Unavailable(f"the blocks of the source are laid out as {text}")
        try:
            memory = mapped(theirs.handle, self._kv.device)
            self._theirs = tuple(KVBlocks(memory, layout) for layout in layouts)
        except ValueError as error:
            raise Unavailable(str(error)) from error
        return b""

    async def send(self, part: OutgoingPart) -> None:
        await part.announce(note=msgspec.msgpack.encode(part.block_ids))

    async def receive(self, part: IncomingPart) -> Write:
        theirs, ours = self._theirs[part.group], self._kv.groups[part.group]
        from_ids = part.noted_blocks(theirs.num_blocks)
        device = self._kv.device

        async def write(block_ids: Sequence[int]) -> float:
            def copy() -> None:
                near = torch.empty(part.num_bytes, dtype=torch.uint8, device=device)
                theirs.gather(from_ids, near)
                ours.scatter(block_ids, near)

            return await self._kv.run(copy)

        return write
