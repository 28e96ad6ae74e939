"""Shards of blocks, copied by workers that are threads here: each rank's go to the same rank."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from llumsched.engine.transfer.blocks import BlockLayout, KVBlocks, Runs
from llumsched.engine.transfer.shards import (
    LENGTH_NUM_BYTES,
    ShardedKV,
    ShardOpened,
    serve_shard,
)
from llumsched.engine.transfer.shared_ring import SendRing, Staging

NUM_BLOCKS = 6
# Bytes of a block in each of two layers; the ranks of an engine may have different ones.
SHARDS = (48, 16)


class Workers:
    """The workers of one engine; their caches are of random bytes."""

    def __init__(self, seed: int, *, refused: str = "") -> None:
        random = torch.Generator().manual_seed(seed)
        self.caches = [
            torch.randint(0, 256, (2, NUM_BLOCKS, size), dtype=torch.uint8, generator=random)
            for size in SHARDS
        ]
        self._refused = refused
        self.kv = ShardedKV(self.open_shards, num_workers=len(SHARDS))

    def open_shards(self, pid: int, pipes: list[tuple[int, int]]) -> list[ShardOpened]:
        opened = []
        for cache, size, pipe in zip(self.caches, SHARDS, pipes, strict=True):
            runs = Runs(
                offset=0,
                num_runs=2,
                run_stride=NUM_BLOCKS * size,
                block_stride=size,
                run_num_bytes=size,
            )
            layout = BlockLayout(name="L", num_blocks=NUM_BLOCKS, runs=(runs,), backend="A")
            opened.append(serve_shard([KVBlocks(cache, layout)], pid, pipe))
        return [*opened[:-1], ShardOpened(refused=self._refused)] if self._refused else opened

    def block(self, block_id: int) -> list[list[int]]:
        return [layer[block_id].tolist() for cache in self.caches for layer in cache]


@pytest.fixture
def engines() -> Iterator[tuple[Workers, Workers]]:
    source, destination = Workers(1), Workers(2)
    yield source, destination
    source.kv.close()
    destination.kv.close()


def copy(
    source: Workers, destination: Workers, blocks: dict[int, int], *, is_mapped: bool = True
) -> None:
    """Blocks of the source to those of the destination, through the second slot of a ring."""

    async def run() -> None:
        num_bytes = len(blocks) * source.kv.block_num_bytes[0]
        ring = SendRing(num_slots=2, slot_num_bytes=num_bytes)
        staging = ring.staging(1, num_bytes)
        assert await source.kv.gather(0, list(blocks), staging) > 0
        come = staging if is_mapped else Staging(content=staging.content)
        await destination.kv.scatter(0, list(blocks.values()), come)
        ring.close()

    asyncio.run(run())


@pytest.mark.parametrize("is_mapped", [True, False], ids=["shared memory", "a socket's bytes"])
def test_every_shard_arrives_and_nothing_else_changes(
    engines: tuple[Workers, Workers], is_mapped: bool
) -> None:
    source, destination = engines
    assert source.kv.block_num_bytes == (2 * sum(SHARDS),)
    assert source.kv.layout == destination.kv.layout == "L: 2 x 48 bytes | L: 2 x 16 bytes"
    assert source.kv.backend == "A | A"
    before = [destination.block(i) for i in range(NUM_BLOCKS)]
    for moved in ({0: 5, 3: 1, 4: 2}, {1: 4}, {0: 0, 1: 1, 2: 2, 5: 3}):
        copy(source, destination, moved, is_mapped=is_mapped)
        for here, there in moved.items():
            before[there] = source.block(here)
        assert [destination.block(i) for i in range(NUM_BLOCKS)] == before


def test_what_a_worker_cannot_copy_is_told(engines: tuple[Workers, Workers]) -> None:
    """The worker goes on, and so does the order of answers."""
    source, destination = engines
    with pytest.raises(RuntimeError, match=r"rank 0 cannot.*IndexError.*; .*rank 1 cannot"):
        copy(source, destination, {0: NUM_BLOCKS})
    copy(source, destination, {2: 3})
    assert destination.block(3) == source.block(2)


def test_a_worker_that_is_gone(engines: tuple[Workers, Workers]) -> None:
    """Found so by its answer that does not come, and after that by the command."""
    source, destination = engines
    to_worker, _ = destination.kv._pipes[1]
    to_worker.write(bytes(LENGTH_NUM_BYTES))  # it takes an empty message for the end
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^the worker of rank 1 .*: it is gone$"):
            copy(source, destination, {2: 4})


def test_one_worker_that_refuses() -> None:
    with pytest.raises(ValueError, match="host memory"):
        Workers(3, refused="a part of the KV cache is in host memory")


def mapped_rings() -> set[str]:
    """Inodes of the mapped rings."""
    gc.collect()
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "llumsched-kv" in line}


def test_rings_that_are_gone_do_not_stay_mapped(engines: tuple[Workers, Workers]) -> None:
    source, destination = engines
    before = mapped_rings()
    for _ in range(5):  # each time through another ring
        copy(source, destination, {2: 3})
    assert len(mapped_rings() - before) == 1, "the last one, until there is another"


def test_nothing_is_left_when_it_is_closed() -> None:
    """The workers end when they notice."""
    gc.collect()  # what tests before this one have left
    this, earlier = psutil.Process(), set(threading.enumerate())
    num_descriptors = this.num_fds()
    workers = Workers(4)
    copy(workers, workers, {2: 3}, is_mapped=False)
    workers.kv.close()
    for thread in set(threading.enumerate()) - earlier:
        thread.join()
    assert this.num_fds() <= num_descriptors
