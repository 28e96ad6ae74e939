"""Blocks through a ``torch.distributed`` group of two processes: gloo, or nccl between GPUs.

The group is apart from the one that a model's shards use. The destination listens, the source
connects; each call blocks a thread of its own until the bytes have gone over. While one part goes
over, the next is gathered.

nccl has not been run. Parts are gathered on the GPU and do not touch the host; each end needs a GPU
of its own. With tensor parallelism nccl is not available: the blocks are those of the workers, and
a second communicator beside theirs could wait for it, and it for the second, for ever.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import torch
from torch._C import _distributed_c10d as c10d
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from llumsched.engine.transfer.shared_ring import Staging
from llumsched.engine.transfer.transport import (
    Here,
    IncomingPart,
    OutgoingPart,
    Transport,
    Unavailable,
    Write,
)

T = TypeVar("T")

TIMEOUT_S = 30.0

_RECEIVER, _SENDER = 0, 1


class GroupChannel:
    """One direction between two processes. Waits in ``__init__`` until both ends are there.

    Args:
        backend: ``gloo`` or ``nccl``.
        rendezvous: ``host:port``; the receiver listens there.
        device: where the bytes lie that go over.

    Raises:
        RuntimeError: if the other end does not come within ``timeout_s``; later, if it is gone.
    """

    def __init__(
        self,
        backend: str,
        rendezvous: str,
        *,
        is_sender: bool,
        timeout_s: float,
        device: torch.device,
    ) -> None:
        host, _, port = rendezvous.rpartition(":")
        timeout = timedelta(seconds=timeout_s)
        store = TCPStore(host, int(port), world_size=2, is_master=not is_sender, timeout=timeout)
        rank = _SENDER if is_sender else _RECEIVER
        self._device = device
        self._group: Any = _group(backend, PrefixStore("kv", store), rank, timeout)
        self._store = store  # lives as long as the group

    def send(self, content: torch.Tensor) -> None:
        """Send uint8 bytes; returns when the memory may be written again."""
        self._wait_for(self._group.send([content], _RECEIVER, 0))

    def receive(self, num_bytes: int) -> torch.Tensor:
        """The next ``num_bytes`` bytes, which must be those of one ``send``."""
        content = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._wait_for(self._group.recv([content], _SENDER, 0))
        return content

    def _wait_for(self, work: Any) -> None:
        work.wait()
        if self._device.type == "cuda":
            # nccl's wait holds up this thread's stream; the blocks are copied on another one.
            torch.cuda.current_stream(self._device).synchronize()


class TorchGroup(Transport):
    """Common part of gloo and nccl."""

    is_automatic = False
    backend: ClassVar[str]
    device = torch.device("cpu")

    def __init__(self, here: Here) -> None:
        super().__init__(here)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-channel")
        self._opened: Future[GroupChannel] | None = None
        # Parts are announced in the order in which they go over.
        self._in_order = asyncio.Lock()
        self._leaving: asyncio.Future[None] | None = None

    async def accept(self, offer: bytes) -> bytes:
        rendezvous = free_rendezvous(self.here.host)
        self._open(rendezvous, is_sender=False)
        return rendezvous.encode()

    async def connect(self, answer: bytes) -> None:
        self.here.ring.prepare()
        self._open(answer.decode(errors="replace"), is_sender=True)
        assert self._opened is not None
        try:
            await asyncio.wrap_future(self._opened)
        except Exception as error:
            raise Unavailable(f"no channel to the destination: {error}") from error

    async def send(self, part: OutgoingPart) -> None:
        num_bytes = part.num_bytes
        content = (await part.gather(self.memory_for(num_bytes))).content
        async with self._in_order:
            await self.flush()
            await part.announce()
            self._leaving = self._run(lambda channel: channel.send(content))

    async def flush(self) -> None:
        if self._leaving is not None:
            await asyncio.shield(self._leaving)

    async def receive(self, part: IncomingPart) -> Write:
        num_bytes = part.num_bytes
        content: torch.Tensor = await self._run(lambda channel: channel.receive(num_bytes))
        return part.scatter(Staging(content=content))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def memory_for(self, num_bytes: int) -> torch.Tensor | None:
        """Where a part is gathered; ``None`` is its slot."""
        return None

    def _open(self, rendezvous: str, *, is_sender: bool) -> None:
        self._opened = self._thread.submit(
            GroupChannel,
            self.backend,
            rendezvous,
            is_sender=is_sender,
            timeout_s=TIMEOUT_S,
            device=self.device,
        )

    def _run(self, function: Callable[[GroupChannel], T]) -> asyncio.Future[T]:
        opened = self._opened
        assert opened is not None, "connect or accept first"
        # The same thread opens the channel, so it has been opened by then, or has failed.
        return asyncio.wrap_future(self._thread.submit(lambda: function(opened.result())))


class Gloo(TorchGroup):
    """Between hosts, from host memory to host memory."""

    name = backend = "gloo"


class Nccl(TorchGroup):
    """Between GPUs. Not run."""

    name = backend = "nccl"

    def __init__(self, here: Here) -> None:
        super().__init__(here)
        self.device = here.kv.device
        if self.device.type != "cuda":
            raise Unavailable("this process has no blocks on a GPU")

    def memory_for(self, num_bytes: int) -> torch.Tensor | None:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)


def _group(backend: str, store: Store, rank: int, timeout: timedelta) -> Any:
    # Built by hand, not by ``init_process_group``: that one is the model's.
    if backend == "gloo":
        return c10d.ProcessGroupGloo(store, rank, 2, timeout)
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return c10d.ProcessGroupNCCL(store, rank, 2, options)


def free_rendezvous(host: str) -> str:
    """An address, as ``host:port``, at which a receiver may listen."""
    with socket.create_server((host, 0)) as listener:
        return f"{host}:{listener.getsockname()[1]}"
