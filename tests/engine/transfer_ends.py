"""Both ends of a transport in one process, and the messages of the migration protocol between."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from llumsched.engine.transfer.access import LocalKV
from llumsched.engine.transfer.blocks import BlockLayout, KVBlocks, Runs
from llumsched.engine.transfer.registry import accepted, offered
from llumsched.engine.transfer.shared_ring import SendRing
from llumsched.engine.transfer.transport import Here, IncomingPart, OutgoingPart, Transport, Write

NUM_BLOCKS, NUM_LAYERS, PAGE_NUM_BYTES = 8, 3, 64
BLOCK_NUM_BYTES = NUM_LAYERS * PAGE_NUM_BYTES
BLOCKS_PER_SLOT = 2


def random_blocks(seed: int, device: str = "cpu") -> KVBlocks:
    """A small KV cache, layer after layer, of random bytes."""
    runs = Runs(
        offset=0,
        num_runs=NUM_LAYERS,
        run_stride=NUM_BLOCKS * PAGE_NUM_BYTES,
        block_stride=PAGE_NUM_BYTES,
        run_num_bytes=PAGE_NUM_BYTES,
    )
    generator = torch.Generator().manual_seed(seed)
    content = torch.randint(0, 256, (runs.end(NUM_BLOCKS),), generator=generator)
    layout = BlockLayout(name="L", num_blocks=NUM_BLOCKS, runs=(runs,), backend="A")
    return KVBlocks(content.to(torch.uint8).to(device), layout)


def blocks_of(here: Here) -> KVBlocks:
    """Of an instance of these tests."""
    assert isinstance(here.kv, LocalKV)
    return here.kv.groups[0]


def block(kv: KVBlocks, block_id: int) -> list[int]:
    """The bytes of a block."""
    layers = kv.buffer.cpu().view(NUM_LAYERS, NUM_BLOCKS, PAGE_NUM_BYTES)
    return [int(byte) for byte in layers[:, block_id].flatten()]


@contextmanager
def instance(kv: KVBlocks, *, checksum: bool = False, num_slots: int = 2) -> Iterator[Here]:
    """An instance with this KV cache, as far as transports use it."""
    ring = SendRing(num_slots=num_slots, slot_num_bytes=BLOCKS_PER_SLOT * kv.block_num_bytes)
    access = LocalKV([kv])
    yield Here(kv=access, ring=ring, host="127.0.0.1", checksum=checksum)
    access.close()
    ring.close()


@dataclass(slots=True)
class Ends:
    """A connection from ``source`` to ``destination``; parts wait in ``announced``."""

    source: Transport
    destination: Transport
    announced: asyncio.Queue[IncomingPart]

    @staticmethod
    async def meet(source: Here, destination: Here, wanted: str) -> Ends:
        """Shake hands."""
        ways = offered(source, wanted)
        offers = {name: offer for name, (_, offer) in ways.items()}
        accepting, answer = await accepted(destination, offers)
        sending = ways[accepting.name][0]
        for way, _ in ways.values():
            if way is not sending:
                way.close()
        await sending.connect(answer)
        return Ends(sending, accepting, asyncio.Queue())

    async def move(self, from_ids: Sequence[int], to_ids: Sequence[int]) -> None:
        """A stage: each part is sent while the one before it may still be read."""
        await asyncio.gather(self._send(from_ids), self._receive(to_ids))

    async def _send(self, from_ids: Sequence[int]) -> None:
        here = self.source.here
        for start in range(0, len(from_ids), BLOCKS_PER_SLOT):
            ids, slot = from_ids[start : start + BLOCKS_PER_SLOT], await here.ring.acquire()
            send = partial(self._announce, len(ids), slot)
            part = OutgoingPart(here=here, group=0, block_ids=ids, slot=slot, send=send)
            await self.source.send(part)
        await self.source.flush()

    async def _announce(
        self,
        num_blocks: int,
        slot: int,
        *,
        note: bytes,
        payload: memoryview[Any] | None,
        checksum: int | None,
    ) -> None:
        part = IncomingPart(
            here=self.destination.here,
            group=0,
            num_blocks=num_blocks,
            slot=slot,
            note=note,
            payload=payload,
            checksum=checksum,
        )
        self.announced.put_nowait(part)

    async def _receive(self, to_ids: Sequence[int]) -> None:
        start = 0
        while start < len(to_ids):
            part = await self.announced.get()
            write: Write = await self.destination.receive(part)
            await write(to_ids[start : start + part.num_blocks])
            start += part.num_blocks
            self.source.here.ring.free(part.slot)

    def close(self) -> None:
        self.source.close()
        self.destination.close()
