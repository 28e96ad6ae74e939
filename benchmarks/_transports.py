"""How fast each transport moves the blocks of a KV cache from one process to another.

Both ends are the migrator's own (``PeerConnection`` and the transports) with a KV cache of plain
tensors, so what is timed is gather, transfer and scatter, and no engine.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection

import torch
import zmq
import zmq.asyncio

from llumsched.core.migration.messages import BlocksCopied, CopyBlocks, ToSource
from llumsched.core.transfer_options import TransferOptions
from llumsched.engine.transfer.access import LocalKV
from llumsched.engine.transfer.blocks import BlockLayout, KVBlocks, Runs
from llumsched.engine.transfer.registry import accepted
from llumsched.engine.transfer.shared_ring import SendRing
from llumsched.engine.transfer.transport import Here, IncomingPart, Transport
from llumsched.migration.link import PeerConnection
from llumsched.migration.messages import (
    Hello,
    SlotRead,
    StoreBlocks,
    Welcome,
    decode_peer,
    encode_peer,
)
from llumsched.migration.migrator import CPU_SLOT_MB
from llumsched.migration.rate_limit import RateLimiter
from llumsched.migration.runs import Run
from llumsched.wire.keys import MAX_CONTROL_NUM_BYTES, Gate, PoolKeys

TRANSPORTS = ("shared_memory", "tcp", "gloo")
NUM_LAYERS, NUM_BLOCKS, BLOCK_SIZE = 30, 160, 32
NUM_REPETITIONS = 7
BYTES_PER_GB = 1e9


def _kv() -> KVBlocks:
    """A cache of the shape that SmolLM2-135M has on CPU, in float32."""
    # As in an instance, whose migrator must not take the cores from the steps.
    torch.set_num_threads(1)
    buffer = torch.zeros(NUM_LAYERS, NUM_BLOCKS, 3 * BLOCK_SIZE * 128)
    layer_num_bytes = buffer[0].nbytes
    runs = Runs(
        offset=0,
        num_runs=NUM_LAYERS,
        run_stride=layer_num_bytes,
        block_stride=layer_num_bytes // NUM_BLOCKS,
        run_num_bytes=layer_num_bytes // NUM_BLOCKS,
    )
    return KVBlocks(buffer, BlockLayout(name="LBHNC", num_blocks=NUM_BLOCKS, runs=(runs,)))


def _here() -> Here:
    kv, options = LocalKV([_kv()]), TransferOptions()
    (block_num_bytes,) = kv.block_num_bytes
    blocks_per_slot = max(1, int(CPU_SLOT_MB * 1e6) // block_num_bytes)
    ring = SendRing(
        num_slots=options.staging_slots, slot_num_bytes=blocks_per_slot * block_num_bytes
    )
    return Here(kv=kv, ring=ring, host="127.0.0.1")


def measure(num_blocks: int, *, quick: bool) -> dict[str, float]:
    """Gigabytes a second of each transport for a stage of ``num_blocks``, and of ``memcpy``."""
    repetitions = 2 if quick else NUM_REPETITIONS
    found = {"memcpy": _memcpy(num_blocks, repetitions)}
    for transport in TRANSPORTS:
        found[transport] = _between_processes(transport, num_blocks, repetitions)
    return found


def _memcpy(num_blocks: int, repetitions: int) -> float:
    num_bytes = num_blocks * _kv().block_num_bytes
    source, copy = (
        torch.ones(num_bytes, dtype=torch.uint8),
        torch.ones(num_bytes, dtype=torch.uint8),
    )
    times_s = []
    for _ in range(repetitions + 1):
        started_s = time.perf_counter()
        copy.copy_(source)
        times_s.append(time.perf_counter() - started_s)
    return num_bytes / statistics.median(times_s[1:]) / BYTES_PER_GB


def _between_processes(transport: str, num_blocks: int, repetitions: int) -> float:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    keys = PoolKeys.generate()
    receiver = context.Process(target=_receive, args=(theirs, keys), daemon=True)
    receiver.start()
    try:
        if not ours.poll(120):
            raise TimeoutError("the receiving process did not start")
        return asyncio.run(_send(ours.recv(), keys, transport, num_blocks, repetitions))
    finally:
        receiver.kill()
        receiver.join()


async def _send(
    endpoint: str, keys: PoolKeys, transport: str, num_blocks: int, repetitions: int
) -> float:
    here = _here()
    ring, (num_bytes,) = here.ring, here.kv.block_num_bytes
    stored: asyncio.Queue[int] = asyncio.Queue()

    def on_answer(message: ToSource) -> None:
        if isinstance(message, BlocksCopied):
            stored.put_nowait(message.stage)

    context = zmq.asyncio.Context()
    link = PeerConnection(context, keys, endpoint, here, RateLimiter(0), on_answer=on_answer)
    await link.open("sender", "", transport)
    times_s = []
    for stage in range(repetitions + 1):  # the first one touches cold memory
        started_s = time.perf_counter()
        command = CopyBlocks(migration_id="m", stage=stage, first_block=0, num_blocks=num_blocks)
        await link.send_blocks(command, 0, [Run(0, 0, list(range(num_blocks)))])
        while await stored.get() != stage:
            pass
        times_s.append(time.perf_counter() - started_s)
    link.close()
    ring.close()
    context.term()
    return num_blocks * num_bytes / statistics.median(times_s[1:]) / BYTES_PER_GB


def _receive(parent: Connection, keys: PoolKeys) -> None:
    asyncio.run(_answer(parent, keys))


async def _answer(parent: Connection, keys: PoolKeys) -> None:
    here = _here()
    context = zmq.asyncio.Context()
    router = context.socket(zmq.ROUTER)
    max_num_bytes = max(here.ring.slot_num_bytes, MAX_CONTROL_NUM_BYTES)
    _gate = Gate(context, keys, [(router, max_num_bytes)], "the receiver")
    router.bind("tcp://127.0.0.1:*")
    parent.send(router.get_string(zmq.LAST_ENDPOINT))
    transport: Transport | None = None
    num_received = 0
    while True:
        identity, *frames = await router.recv_multipart(copy=False)
        message = decode_peer(frames[0].buffer)
        if isinstance(message, Hello):
            transport, answer = await accepted(here, message.offers)
            welcome = Welcome(transport=transport.name, answer=answer)
            await router.send_multipart([identity, encode_peer(welcome)])
        elif isinstance(message, StoreBlocks) and transport is not None:
            part = IncomingPart(
                here=here,
                group=message.group,
                num_blocks=message.num_blocks,
                slot=message.slot,
                note=message.note,
                payload=frames[1].buffer if len(frames) > 1 else None,
            )
            write = await transport.receive(part)
            first = message.first_block
            await write(list(range(first, first + message.num_blocks)))
            read = SlotRead(slot=message.slot, use=message.use)
            await router.send_multipart([identity, encode_peer(read)])
            num_received += message.num_blocks
            if num_received == message.stage_num_blocks:
                num_received = 0
                done = BlocksCopied(
                    migration_id="m", stage=message.stage, num_blocks_total=message.stage_num_blocks
                )
                await router.send_multipart([identity, encode_peer(done)])
