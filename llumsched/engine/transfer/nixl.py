"""Blocks that the destination reads out of the source's KV cache by way of NIXL.

NIXL (https://github.com/ai-dynamo/nixl; ``pip install 'llumsched[nixl]'``) is used as a library,
not through a connector of vLLM: each instance registers its KV cache once, and the destination of a
migration reads runs of bytes. UCX chooses what they travel over: NVLink, RDMA, shared memory, TCP.
Nothing is gathered, and the source has no work with it.

Run on CPUs, between two processes of one host. Not run on GPUs, between hosts, or over RDMA. When a
read fails, the destination declines NIXL from then on, and the next hand-shake takes what is next.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
import numpy as np
import numpy.typing as npt
from nixl._api import nixl_agent, nixl_agent_config

from llumsched.engine.transfer.access import LocalKV
from llumsched.engine.transfer.blocks import KVBlocks, Runs
from llumsched.engine.transfer.transport import (
    Broken,
    Here,
    IncomingPart,
    OutgoingPart,
    Transport,
    Unavailable,
    Write,
)

POLL_INTERVAL_S = 0.0005
READ_TIMEOUT_S = 30.0


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """A registered KV cache: NIXL's description of its process, and where the blocks are in it."""

    agent: bytes
    kind: str
    address: int
    device_id: int
    groups: tuple[tuple[Runs, ...], ...]


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks of a group to read, and the memory that they are in."""

    memory: Memory
    group: int
    block_ids: list[int]


class _Agent:
    """NIXL in this process, for one KV cache. NIXL is called on one thread, which waits for it."""

    def __init__(self, groups: Sequence[KVBlocks]) -> None:
        blocks = groups[0]  # all groups are in one allocation
        self._nixl: Any = nixl_agent(uuid.uuid4().hex, nixl_agent_config(backends=["UCX"]))
        self._nixl.register_memory(blocks.buffer)
        self._peers: dict[bytes, str] = {}
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-nixl")
        self.failure = ""
        self.memory = Memory(
            agent=self._nixl.get_agent_metadata(),
            kind="VRAM" if blocks.device.type == "cuda" else "DRAM",
            address=blocks.buffer.data_ptr(),
            device_id=max(0, blocks.buffer.get_device()),
            groups=tuple(group.layout.runs for group in groups),
        )

    def read(self, note: Note, to_ids: Sequence[int]) -> None:
        """Copy blocks of another process into blocks of this one; raises what NIXL does."""
        theirs = note.memory
        if not to_ids:
            return
        if theirs.agent not in self._peers:
            self._peers[theirs.agent] = self._nixl.add_remote_agent(theirs.agent)
        handle = self._nixl.initialize_xfer(
            "READ",
            self._nixl.get_xfer_descs(_places(self.memory, note.group, to_ids), self.memory.kind),
            self._nixl.get_xfer_descs(_places(theirs, note.group, note.block_ids), theirs.kind),
            self._peers[theirs.agent],
        )
        try:
            end_s = time.monotonic() + READ_TIMEOUT_S
            state = self._nixl.transfer(handle)
            while state == "PROC" and time.monotonic() < end_s:
                time.sleep(POLL_INTERVAL_S)
                state = self._nixl.check_xfer_state(handle)
        finally:
            self._nixl.release_xfer_handle(handle)
        if state != "DONE":
            raise OSError(f"NIXL's read ended with {state}")


_agents: WeakKeyDictionary[KVBlocks, _Agent] = WeakKeyDictionary()
_starting = threading.Lock()


def _agent_of(groups: Sequence[KVBlocks]) -> _Agent:
    first = groups[0]
    with _starting:
        if first not in _agents:
            try:
                _agents[first] = _Agent(groups)
            except Exception as error:  # of NIXL's own kinds
                raise Unavailable(f"NIXL does not start: {error}") from error
        return _agents[first]


class Nixl(Transport):
    """The source names blocks, the destination reads them."""

    name = "nixl"
    _agent: _Agent

    def __init__(self, here: Here) -> None:
        super().__init__(here)
        if not isinstance(here.kv, LocalKV):
            raise Unavailable("the blocks are in the memory of the instance's workers")
        if here.checksum:
            raise Unavailable("the bytes pass nobody who could add a checksum")
        self._groups = here.kv.groups

    async def accept(self, offer: bytes) -> bytes:
        self._agent = await asyncio.to_thread(_agent_of, self._groups)
        if self._agent.failure:
            raise Unavailable(self._agent.failure)
        return b""

    async def connect(self, answer: bytes) -> None:
        self._agent = await asyncio.to_thread(_agent_of, self._groups)

    async def send(self, part: OutgoingPart) -> None:
        note = Note(memory=self._agent.memory, group=part.group, block_ids=list(part.block_ids))
        await part.announce(note=msgspec.msgpack.encode(note))

    async def receive(self, part: IncomingPart) -> Write:
        try:
            note = msgspec.msgpack.decode(part.note, type=Note)
        except msgspec.DecodeError as error:
            raise ValueError(f"the note names no blocks: {error}") from error
        if (note.group, len(note.block_ids)) != (part.group, part.num_blocks):
            raise ValueError(f"the note names {len(note.block_ids)} blocks, not {part.num_blocks}")
        theirs = [_sizes(runs) for runs in note.memory.groups]
        if theirs != [_sizes(group.layout.runs) for group in self._groups]:
            raise ValueError("the blocks of the source are laid out in another way")

        async def read(block_ids: Sequence[int]) -> float:
            agent, loop = self._agent, asyncio.get_running_loop()
            try:
                await loop.run_in_executor(agent.thread, agent.read, note, block_ids)
            except Exception as error:  # of NIXL's own kinds
                agent.failure = f"a read has failed: {error!r}"
                raise Broken(agent.failure) from error
            return 0.0

        return read


def _sizes(kinds: Sequence[Runs]) -> list[tuple[int, int]]:
    return [(runs.num_runs, runs.run_num_bytes) for runs in kinds]


def _places(memory: Memory, group: int, block_ids: Sequence[int]) -> npt.NDArray[np.uint64]:
    """Address, length and device of every run of these blocks of a group."""
    ids, found = np.array(block_ids, dtype=np.uint64), []
    for runs in memory.groups[group]:
        steps = np.arange(runs.num_runs, dtype=np.uint64)[:, None] * np.uint64(runs.run_stride)
        places = (
            np.uint64(memory.address + runs.offset) + steps + ids * np.uint64(runs.block_stride)
        )
        rows = np.empty((places.size, 3), dtype=np.uint64)
        rows[:, 0] = places.ravel()
        rows[:, 1:] = runs.run_num_bytes, memory.device_id
        found.append(rows)
    return np.concatenate(found)
