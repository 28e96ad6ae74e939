"""How KV blocks get from one process to another: shared memory inside a host, else a socket.

The sender owns a ring of equal slots. Between processes of one host the ring is anonymous
shared memory (``memfd``): the receiver maps it through ``/proc/<pid>/fd/<fd>``, so there is no
name to leak and the kernel frees it with the last process that holds it; only a process of the same
user may open it. Between hosts the
slot's bytes follow the message as a frame of their own. Either way a slot belongs to the
sender until it is handed over and comes back with the receiver's acknowledgement.

This knows bytes and slots; it does not know requests, blocks or the protocol.
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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

    The memory is touched once at the start: a first write to a cold page costs ten times
    what the copy does.
    """

    def __init__(self, *, num_slots: int, slot_num_bytes: int, pinned: bool = False) -> None:
        self.num_slots = num_slots
        self.slot_num_bytes = slot_num_bytes
        self._fd = os.memfd_create("llumsched-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        size = num_slots * slot_num_bytes
        os.ftruncate(self._fd, size)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SIZE_SEALS)
        self._map = mmap.mmap(self._fd, size)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._bytes.zero_()
        self._pinned = pinned
        if pinned:
            _pin(self._bytes)
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

    async def acquire(self) -> int:
        """Wait for a slot that nobody reads."""
        return await self._free.get()

    def free(self, slot: int) -> None:
        """Give a slot back, once for each time it was acquired."""
        self._free.put_nowait(slot)

    def slot(self, slot: int) -> torch.Tensor:
        """The slot's bytes: uint8, ``slot_num_bytes`` long."""
        start = slot * self.slot_num_bytes
        return self._bytes[start : start + self.slot_num_bytes]

    def staging(self, slot: int, num_bytes: int) -> Staging:
        """The first bytes of a slot, for this process and others."""
        return Staging(content=self.slot(slot)[:num_bytes], ring=self._offer, slot=slot)

    def close(self) -> None:
        if self._pinned:
            cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            cudart.cudaHostUnregister(self._bytes.data_ptr())
        os.close(self._fd)


class ReceiveRing:
    """A sender's ring, mapped into this process.

    Raises:
        OSError: if the ring is on another host or its process is gone or not accessible; the
            bytes have to come through the socket then.
    """

    def __init__(self, offer: RingOffer) -> None:
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
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

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


def _pin(memory: torch.Tensor) -> None:
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(status) != 0:
        raise OSError(f"CUDA cannot lock {memory.nbytes} bytes of staging memory: {status}")


def host_id() -> str:
    """Equal in two processes only if they run under one kernel and one process namespace."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id}:{Path('/proc/self/ns/pid').readlink()}:{socket.gethostname()}"
