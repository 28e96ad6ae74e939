"""Staging memory: a ring of equal slots that other processes of the host can map.

The ring is anonymous shared memory (``memfd``). A receiver maps it through ``/proc/<pid>/fd/<fd>``,
so there is no name to leak, and the kernel frees it with the last process that holds it; only a
process of the same user may open it. A slot belongs to the sender until it is handed over, and
comes back with the receiver's acknowledgement.

Knows bytes and slots, but no requests, blocks or messages.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import mmap
import os
import socket
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


logger = logging.getLogger(__name__)

# Whoever reads memory that has shrunk is killed.
SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True, kw_only=True)
class RingOffer:
    """Where a sender's ring can be mapped by a process of the same host.

    ``boot_id`` tells hosts apart, ``inode`` that the descriptor is still the ring it was.
    """

    boot_id: str
    pid: int
    fd: int
    inode: int
    num_slots: int
    slot_num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Staging:
    """The bytes of some blocks: ``content``, uint8, and the slot of the ring that they begin.

    ``ring`` is where other processes of the host can map them; ``None`` if they cannot.
    """

    content: torch.Tensor
    ring: RingOffer | None = None
    slot: int = 0


class SendRing:
    """The sender's slots. ``acquire`` waits for a free one; ``free`` returns it.

    Args:
        num_slots: slots in flight at once; two let a gather overlap the receiver's scatter.
        slot_num_bytes: size of each, in bytes.
        pinned: lock the memory for the copies of a GPU. Not run on a GPU.

    Memory is taken by ``prepare``, or with the first use of a slot.
    """

    def __init__(self, *, num_slots: int, slot_num_bytes: int, pinned: bool = False) -> None:
        self.num_slots = num_slots
        self.slot_num_bytes = slot_num_bytes
        self._fd = os.memfd_create("llumsched-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        size = num_slots * slot_num_bytes
        os.ftruncate(self._fd, size)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SIZE_SEALS)
        self._map = mmap.mmap(self._fd, size)
        self._bytes = bytes_of(self._map)
        self._is_prepared = False
        self._pinned = pinned
        self._offer = RingOffer(
            boot_id=host_id(),
            pid=os.getpid(),
            fd=self._fd,
            inode=os.fstat(self._fd).st_ino,
            num_slots=num_slots,
            slot_num_bytes=slot_num_bytes,
        )
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for slot in range(num_slots):
            self._free.put_nowait(slot)

    def offer(self) -> RingOffer:
        return self._offer

    def prepare(self) -> None:
        """Touch and lock the memory, once: the first write to a page costs ten times the copy."""
        if not self._is_prepared:
            self._is_prepared = True
            self._bytes.zero_()
            if self._pinned:
                pin(self._bytes, self)

    async def acquire(self) -> int:
        """Wait for a slot that nobody reads."""
        return await self._free.get()

    def free(self, slot: int) -> None:
        """Give a slot back, once for each time it was acquired."""
        self._free.put_nowait(slot)

    def slot(self, slot: int) -> torch.Tensor:
        """The slot's bytes: uint8, ``slot_num_bytes`` long."""
        self.prepare()
        start = slot * self.slot_num_bytes
        return self._bytes[start : start + self.slot_num_bytes]

    def staging(self, slot: int, num_bytes: int) -> Staging:
        """The first bytes of a slot, for this process and others."""
        return Staging(content=self.slot(slot)[:num_bytes], ring=self._offer, slot=slot)

    def close(self) -> None:
        os.close(self._fd)


class ReceiveRing:
    """A sender's ring, mapped into this process.

    Args:
        pinned: lock the mapping for the copies of a GPU. Not run on a GPU.

    Raises:
        OSError: if the ring is on another host or its process is gone or not accessible; the
            bytes have to come through the socket then.
    """

    def __init__(self, offer: RingOffer, *, pinned: bool = False) -> None:
        if offer.boot_id != host_id():
            raise OSError("the ring is on another host")
        if offer.num_slots <= 0 or offer.slot_num_bytes <= 0:
            raise OSError("the offered ring is empty")
        self.offer = offer
        self.num_slots = offer.num_slots
        self.slot_num_bytes = offer.slot_num_bytes
        fd = os.open(f"/proc/{offer.pid}/fd/{offer.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            stat = os.fstat(fd)
            size = offer.num_slots * offer.slot_num_bytes
            if stat.st_ino != offer.inode or stat.st_size != size:
                raise OSError("the offered descriptor is not the ring any more")
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SIZE_SEALS != SIZE_SEALS:
                raise OSError("the offered memory may shrink while it is read")
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        self._bytes = bytes_of(self._map)
        if pinned:
            pin(self._bytes, self)

    def is_offered(self) -> bool:
        """True if its sender still has it."""
        try:
            stat = Path(f"/proc/{self.offer.pid}/fd/{self.offer.fd}").stat()
        except OSError:
            return False
        return stat.st_ino == self.offer.inode

    def slot(self, slot: int) -> torch.Tensor:
        """The slot's bytes; raises ``IndexError`` for a slot the ring does not have."""
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot {slot} of a ring of {self.num_slots}")
        start = slot * self.slot_num_bytes
        return self._bytes[start : start + self.slot_num_bytes]


def bytes_of(memory: Any) -> torch.Tensor:
    """The bytes of memory that others have as well, uint8."""
    # Only a process that moves blocks needs torch, not one that reads what a migrator is.
    import torch

    return torch.frombuffer(memory, dtype=torch.uint8)


def pin(memory: torch.Tensor, owner: object) -> bool:
    """Lock memory for the copies of a GPU until ``owner`` is gone; whether that was possible.

    Copies from and to memory that is not locked are right as well, and slower: the driver stages
    them. Where locking is refused, as in some sandboxes, a warning says so and they go on.
    """
    import torch

    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = memory.data_ptr()
    status = int(cudart.cudaHostRegister(address, memory.nbytes, 0))
    if status != 0:
        logger.warning(
            "CUDA cannot lock %d MB of staging memory (error %d): blocks move more slowly",
            memory.nbytes // 1_000_000,
            status,
        )
        return False
    weakref.finalize(owner, cudart.cudaHostUnregister, address).atexit = False
    return True


def host_id() -> str:
    """Equal in two processes only if they run under one kernel and one process namespace."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id}:{Path('/proc/self/ns/pid').readlink()}:{socket.gethostname()}"
