"""The KV blocks of an engine with several workers: a shard of each block in every worker.

In a slot of staging memory the shards lie rank after rank, so one part of a stage has those of all
ranks, and has arrived when all have. Each worker maps the slot and copies its own part, on a thread
beside that of its steps: within a host a shard goes from worker to worker of the same rank, and
the engine's process only says which blocks. Between hosts it also sends the slot's bytes.

The engine and a worker talk through two pipes, which have no name and end with either of them.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO

import msgspec
import torch

from llumsched.engine.transfer.blocks import KVBlocks, texts_of
from llumsched.engine.transfer.shared_ring import ReceiveRing, RingOffer, SendRing, Staging

LENGTH_NUM_BYTES = 4


class ShardOpened(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's part of each group's blocks, and its kind of device; ``refused`` is why its blocks
    cannot be copied."""

    layout: str = ""
    backend: str = ""
    block_num_bytes: tuple[int, ...] = ()
    device_type: str = ""
    refused: str = ""


class CopyShard(msgspec.Struct, frozen=True, kw_only=True):
    """Copy a worker's shards of these blocks of a group into a slot, or with ``is_scatter`` out.

    They begin at byte ``start`` of the slot.
    """

    is_scatter: bool
    group: int
    block_ids: list[int]
    ring: RingOffer
    slot: int
    start: int


class ShardCopied(msgspec.Struct, frozen=True, kw_only=True):
    """``error`` is empty if all was copied, which took ``core_s`` of a core's time."""

    core_s: float = 0.0
    error: str = ""


class ShardedKV:
    """The blocks of all workers, seen from the engine's process.

    Args:
        open_shards: has every worker call ``serve_shard`` with the process id and its own pair of
            the descriptors given; the answers are in the order of ranks.

    Raises:
        ValueError: if a worker's blocks cannot be copied.
    """

    # The workers lock what they map of it.
    pins_staging = False
    device = torch.device("cpu")

    def __init__(
        self,
        open_shards: Callable[[int, list[tuple[int, int]]], list[ShardOpened]],
        *,
        num_workers: int,
    ) -> None:
        commands = [os.pipe() for _ in range(num_workers)]
        answers = [os.pipe() for _ in range(num_workers)]
        self._pipes = [
            (FileIO(command, "wb"), FileIO(answer, "rb"))
            for (_, command), (answer, _) in zip(commands, answers, strict=True)
        ]
        theirs = [
            (command, answer) for (command, _), (_, answer) in zip(commands, answers, strict=True)
        ]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-shards")
        self._inbox: SendRing | None = None
        self._inbox_lock = asyncio.Lock()
        try:
            shards = open_shards(os.getpid(), theirs)
        finally:
            for pair in theirs:
                for descriptor in pair:
                    os.close(descriptor)
        refused = [shard.refused for shard in shards if shard.refused]
        if refused:
            self.close()
            raise ValueError(refused[0])
        self._shard_num_bytes = [shard.block_num_bytes for shard in shards]
        self.copies_on_cores = any(shard.device_type == "cpu" for shard in shards)
        self.layout = " | ".join(shard.layout for shard in shards)
        self.backend = " | ".join(shard.backend for shard in shards)
        self.block_num_bytes = tuple(map(sum, zip(*self._shard_num_bytes, strict=True)))

    async def gather(self, group: int, block_ids: Sequence[int], staging: Staging) -> float:
        assert staging.ring is not None, "what is gathered goes into a ring"
        return await self._copy(group, block_ids, staging.ring, staging.slot, is_scatter=False)

    async def scatter(self, group: int, block_ids: Sequence[int], staging: Staging) -> float:
        if staging.ring is not None:
            return await self._copy(group, block_ids, staging.ring, staging.slot, is_scatter=True)
        async with self._inbox_lock:
            inbox = self._inbox_for(len(staging.content))
            inbox.slot(0)[: len(staging.content)] = staging.content
            return await self._copy(group, block_ids, inbox.offer(), 0, is_scatter=True)

    def close(self) -> None:
        for to_worker, from_worker in self._pipes:
            to_worker.close()
            from_worker.close()
        self._thread.shutdown(wait=False)
        if self._inbox is not None:
            self._inbox.close()
            self._inbox = None

    def _inbox_for(self, num_bytes: int) -> SendRing:
        """Memory that the workers can map, for bytes that came through a socket."""
        if self._inbox is None or self._inbox.slot_num_bytes < num_bytes:
            if self._inbox is not None:
                self._inbox.close()
            self._inbox = SendRing(num_slots=1, slot_num_bytes=num_bytes)
        return self._inbox

    async def _copy(
        self, group: int, block_ids: Sequence[int], ring: RingOffer, slot: int, *, is_scatter: bool
    ) -> float:
        commands, start = [], 0
        for shard_num_bytes in (of_groups[group] for of_groups in self._shard_num_bytes):
            commands.append(
                CopyShard(
                    is_scatter=is_scatter,
                    group=group,
                    block_ids=list(block_ids),
                    ring=ring,
                    slot=slot,
                    start=start,
                )
            )
            start += len(block_ids) * shard_num_bytes
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._exchange, commands)

    def _exchange(self, commands: Sequence[CopyShard]) -> float:
        """One command to each worker, and their answers: all of them, for the next ones' sake."""
        gone = ShardCopied(error="it is gone")
        answers: dict[int, ShardCopied] = {}
        for rank, ((to_worker, _), command) in enumerate(zip(self._pipes, commands, strict=True)):
            try:
                _write(to_worker, command)
            except BrokenPipeError:
                answers[rank] = gone
        for rank, (_, from_worker) in enumerate(self._pipes):
            if rank not in answers:
                frame = _read(from_worker)
                answers[rank] = msgspec.msgpack.decode(frame, type=ShardCopied) if frame else gone
        failed = [
            f"the worker of rank {rank} cannot copy its blocks: {answer.error}"
            for rank, answer in answers.items()
            if answer.error
        ]
        if failed:
            raise RuntimeError("; ".join(failed))
        return max(answer.core_s for answer in answers.values())


# ---- run inside a worker ----------------------------------------------------------------------


def serve_shard(groups: Sequence[KVBlocks], engine_pid: int, pipe: tuple[int, int]) -> ShardOpened:
    """Begin to copy for the engine; ``pipe`` are its descriptors for this rank."""
    command, answer = pipe
    commands = FileIO(f"/proc/{engine_pid}/fd/{command}", "rb")
    answers = FileIO(f"/proc/{engine_pid}/fd/{answer}", "wb")
    threading.Thread(
        target=_serve, args=(groups, commands, answers), name="kv-shard", daemon=True
    ).start()
    layout, backend = texts_of(groups)
    return ShardOpened(
        layout=layout,
        backend=backend,
        block_num_bytes=tuple(kv.block_num_bytes for kv in groups),
        device_type=groups[0].device.type,
    )


def _serve(groups: Sequence[KVBlocks], commands: FileIO, answers: FileIO) -> None:
    rings: dict[RingOffer, ReceiveRing] = {}
    with commands, answers:
        while frame := _read(commands):
            command = msgspec.msgpack.decode(frame, type=CopyShard)
            started_s = time.thread_time()
            kv = groups[command.group]
            try:
                _copy_shard(kv, command, _mapped(command.ring, rings, kv.device))
            except Exception as error:  # told to the engine, whose migration ends of it
                _write(answers, ShardCopied(error=repr(error)))
            else:
                _write(answers, ShardCopied(core_s=time.thread_time() - started_s))


def _mapped(
    offer: RingOffer, rings: dict[RingOffer, ReceiveRing], device: torch.device
) -> ReceiveRing:
    """The ring, from those mapped before; rings that nobody offers any more are let go."""
    if offer not in rings:
        for gone in [other for other, ring in rings.items() if not ring.is_offered()]:
            del rings[gone]
        rings[offer] = ReceiveRing(offer, pinned=device.type == "cuda")
    return rings[offer]


def _copy_shard(kv: KVBlocks, command: CopyShard, ring: ReceiveRing) -> None:
    num_bytes = len(command.block_ids) * kv.block_num_bytes
    part = ring.slot(command.slot)[command.start : command.start + num_bytes]
    if len(part) < num_bytes:
        raise ValueError(f"a slot of {ring.slot_num_bytes} bytes has no room for these blocks")
    copy = kv.scatter if command.is_scatter else kv.gather
    copy(command.block_ids, part)


def _write(pipe: FileIO, message: msgspec.Struct) -> None:
    frame = msgspec.msgpack.encode(message)
    pipe.write(len(frame).to_bytes(LENGTH_NUM_BYTES) + frame)


def _read(pipe: FileIO) -> bytes:
    """The next message; empty if the other end is gone."""
    return _read_bytes(pipe, int.from_bytes(_read_bytes(pipe, LENGTH_NUM_BYTES)))


def _read_bytes(pipe: FileIO, num_bytes: int) -> bytes:
    content = b""
    while len(content) < num_bytes:
        more = pipe.read(num_bytes - len(content))
        if not more:
            return b""
        content += more
    return content
