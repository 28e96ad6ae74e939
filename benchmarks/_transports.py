"""How fast each transport moves the blocks of a KV cache from one process to another.

Both ends are the migrator's own (``PeerConnection``, ``Session``), with plain tensors as KV, so
what is timed is gather, transfer and scatter, and no engine.
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

from llumsched.core.transfer_options import TransferOptions
from llumsched.engine.transfer.access import LocalKV
from llumsched.engine.transfer.blocks import BlockLayout, KVBlocks, Runs
from llumsched.engine.transfer.shared_ring import ReceiveRing, SendRing
from llumsched.engine.transfer.torch_channel import free_rendezvous
from llumsched.migration.link import PeerConnection, Session, receiving_channel
from llumsched.migration.messages import (
    Hello,
    PeerMessage,
    SlotRead,
    StageStored,
    StoreBlocks,
    Welcome,
    decode_peer,
)
from llumsched.migration.rate_limit import RateLimiter
from llumsched.wire.control import encode
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
    kv, options = _kv(), TransferOptions()
    blocks_per_slot = max(1, int(options.staging_slot_mb * 1e6) // kv.block_num_bytes)
    ring = SendRing(
        num_slots=options.staging_slots, slot_num_bytes=blocks_per_slot * kv.block_num_bytes
    )
    stored: asyncio.Queue[int] = asyncio.Queue()

    def on_answer(message: PeerMessage) -> bool:
        if isinstance(message, StageStored):
            stored.put_nowait(message.stage)
        return True

    context = zmq.asyncio.Context()
    link = PeerConnection(
        context,
        keys,
        endpoint,
        ring,
        LocalKV(kv),
        RateLimiter(0),
        checksum=False,
        on_answer=on_answer,
    )
    await link.open("sender", "", transport)
    times_s = []
    for stage in range(repetitions + 1):  # the first one touches cold memory
        started_s = time.perf_counter()
        await link.send_blocks("m", stage, list(range(num_blocks)), 0, is_final=False)
        while await stored.get() != stage:
            pass
        times_s.append(time.perf_counter() - started_s)
    link.close()
    ring.close()
    context.term()
    return num_blocks * kv.block_num_bytes / statistics.median(times_s[1:]) / BYTES_PER_GB


def _receive(parent: Connection, keys: PoolKeys) -> None:
    asyncio.run(_answer(parent, keys))


async def _answer(parent: Connection, keys: PoolKeys) -> None:
    kv = _kv()
    context = zmq.asyncio.Context()
    router = context.socket(zmq.ROUTER)
    _gate = Gate(context, keys, [(router, MAX_CONTROL_NUM_BYTES)], "the receiver")
    router.bind("tcp://127.0.0.1:*")
    parent.send(router.get_string(zmq.LAST_ENDPOINT))
    session = Session(ring=None, channel=None)
    num_received = 0
    while True:
        identity, *frames = await router.recv_multipart(copy=False)
        message = decode_peer(frames[0].buffer)
        if isinstance(message, Hello):
            session, welcome = _open(message)
            await router.send_multipart([identity, encode(welcome)])
        elif isinstance(message, StoreBlocks):
            payload = frames[1].buffer if len(frames) > 1 else None
            staging = await session.staging(
                message, message.num_blocks * kv.block_num_bytes, payload
            )
            first = message.first_block
            kv.scatter(list(range(first, first + message.num_blocks)), staging.content)
            await router.send_multipart(
                [identity, encode(SlotRead(slot=message.slot, use=message.use))]
            )
            num_received += message.num_blocks
            if num_received == message.stage_num_blocks:
                num_received = 0
                done = StageStored(
                    migration_id="m", stage=message.stage, num_blocks_total=message.stage_num_blocks
                )
                await router.send_multipart([identity, encode(done)])


def _open(hello: Hello) -> tuple[Session, Welcome]:
    if hello.transport == "gloo":
        rendezvous = free_rendezvous("127.0.0.1")
        channel = receiving_channel("gloo", rendezvous)
        return Session(ring=None, channel=channel), Welcome(transport="gloo", rendezvous=rendezvous)
    if hello.transport == "tcp":
        return Session(ring=None, channel=None), Welcome(transport="tcp")
    ring = ReceiveRing(hello.ring)
    return Session(ring=ring, channel=None), Welcome(transport="shared_memory")
