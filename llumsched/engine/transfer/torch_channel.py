"""Bytes from one process to another through ``torch.distributed``: gloo, or nccl between GPUs.

Two processes form a group of their own, apart from the one that a model's shards use. The receiver
listens, the sender connects; each call blocks its thread until the bytes have gone over.

nccl has not been run: there, staging memory has to lie on the GPU.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

_RECEIVER, _SENDER = 0, 1


def free_rendezvous(host: str) -> str:
    """An address, as ``host:port``, at which a receiver may listen."""
    with socket.create_server((host, 0)) as listener:
        return f"{host}:{listener.getsockname()[1]}"


class GroupChannel:
    """One direction between two processes. Waits in ``__init__`` until both ends are there.

    Args:
        backend: ``gloo`` or ``nccl``.
        rendezvous: ``host:port``; the receiver listens there.

    Raises:
        RuntimeError: if the other end does not come within ``timeout_s``; later, if it is gone.
    """

    def __init__(self, backend: str, rendezvous: str, *, is_sender: bool, timeout_s: float) -> None:
        host, _, port = rendezvous.rpartition(":")
        timeout = timedelta(seconds=timeout_s)
        store = TCPStore(host, int(port), world_size=2, is_master=not is_sender, timeout=timeout)
        rank = _SENDER if is_sender else _RECEIVER
        self._device = torch.device("cpu" if backend == "gloo" else "cuda")
        self._group: Any = _group(backend, PrefixStore("kv", store), rank, timeout)
        self._store = store  # lives as long as the group

    def send(self, staging: torch.Tensor) -> None:
        """Send uint8 bytes; returns when the memory may be written again."""
        self._wait_for(self._group.send([staging.to(self._device)], _RECEIVER, 0))

    def receive(self, num_bytes: int) -> torch.Tensor:
        """The next ``num_bytes`` bytes, which must be those of one ``send``."""
        staging = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._wait_for(self._group.recv([staging], _SENDER, 0))
        return staging

    def _wait_for(self, work: Any) -> None:
        work.wait()
        if self._device.type == "cuda":
            # nccl's wait holds up this thread's stream; the blocks are copied on another one.
            torch.cuda.current_stream().synchronize()


def _group(backend: str, store: Store, rank: int, timeout: timedelta) -> Any:
    # Built by hand, not by ``init_process_group``: that one is the model's.
    if backend == "gloo":
        return c10d.ProcessGroupGloo(store, rank, 2, timeout)
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return c10d.ProcessGroupNCCL(store, rank, 2, options)
