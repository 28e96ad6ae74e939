"""Every transport moves blocks exactly, says why it cannot, and is found by its name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from importlib.util import find_spec
from typing import Any

import msgspec
import pytest
import torch

from llumsched.core.transfer_options import AUTO, TRANSPORTS
from llumsched.engine.transfer import cuda_ipc
from llumsched.engine.transfer.registry import accepted, offered, transport_class
from llumsched.engine.transfer.shared_memory import SharedMemory
from llumsched.engine.transfer.shared_ring import Staging
from llumsched.engine.transfer.transport import Here, IncomingPart, Transport, Unavailable
from tests.engine.transfer_ends import (
    BLOCK_NUM_BYTES,
    NUM_BLOCKS,
    Ends,
    block,
    blocks_of,
    instance,
    random_blocks,
)

ON_THIS_MACHINE = [
    "shared_memory",
    pytest.param("nixl", marks=pytest.mark.skipif(not find_spec("nixl"), reason="not installed")),
    "tcp",
    "gloo",
]


def run(scenario: Callable[[Here, Here], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def play() -> None:
        with (
            instance(random_blocks(1), **options) as source,
            instance(random_blocks(2), **options) as destination,
        ):
            async with asyncio.timeout(60):
                await scenario(source, destination)

    asyncio.run(play())


@pytest.mark.parametrize("name", ON_THIS_MACHINE)
def test_blocks_arrive_and_nothing_else_changes(name: str) -> None:
    """More parts than there are slots, and a last part that does not fill its slot."""

    run(partial(moves_exactly, name))


@pytest.mark.parametrize("name", ["shared_memory", "tcp", "gloo"])
def test_with_a_checksum_of_every_part(name: str) -> None:
    run(partial(moves_exactly, name), checksum=True)


async def moves_exactly(name: str, source: Here, destination: Here) -> None:
    theirs, ours = blocks_of(source), blocks_of(destination)
    expected = [block(ours, i) for i in range(NUM_BLOCKS)]
    ends = await Ends.meet(source, destination, name)
    assert ends.source.name == ends.destination.name == name
    for moved in ({0: 3, 5: 1, 2: 7, 7: 0, 3: 2}, {1: 4}):
        await ends.move(list(moved), list(moved.values()))
        for here, there in moved.items():
            expected[there] = block(theirs, here)
        assert [block(ours, i) for i in range(NUM_BLOCKS)] == expected
    ends.close()


def test_what_a_destination_reads_out_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA IPC without what needs a GPU, the sharing itself: with a cache of this process."""
    handle = cuda_ipc.Handle(
        device=0,
        memory=b"m",
        num_bytes=0,
        offset=0,
        ref_counter=b"r",
        ref_counter_offset=0,
        event=b"e",
        waits_for_event=False,
    )

    async def scenario(source: Here, destination: Here) -> None:
        with pytest.raises(Unavailable, match="in no GPU's memory"):
            offered(source, "cuda_ipc")
        with pytest.raises(Unavailable, match="in no GPU's memory"):
            cuda_ipc.mapped(handle, torch.device("cpu"))
        monkeypatch.setattr(cuda_ipc, "share", lambda _buffer: handle)
        monkeypatch.setattr(cuda_ipc, "mapped", lambda h, _d: blocks_of(source).buffer)
        await moves_exactly("cuda_ipc", source, destination)

        ends = await Ends.meet(source, destination, "cuda_ipc")
        for note in (
            b"nonsense",
            msgspec.msgpack.encode([1, NUM_BLOCKS]),
            msgspec.msgpack.encode([1]),
        ):
            part = IncomingPart(here=destination, group=0, num_blocks=2, slot=0, note=note)
            with pytest.raises(ValueError, match="the note names"):
                await ends.destination.receive(part)

        monkeypatch.setattr(cuda_ipc, "host_id", lambda: "here")
        offer = offered(source, "cuda_ipc")["cuda_ipc"][1]
        monkeypatch.setattr(cuda_ipc, "host_id", lambda: "there")
        with pytest.raises(Unavailable, match="on another host"):
            await accepted(destination, {"cuda_ipc": offer})

    run(scenario)


def test_bytes_that_pass_nobody_have_no_checksum() -> None:
    async def scenario(source: Here, destination: Here) -> None:
        with pytest.raises(Unavailable, match="nobody who could add a checksum"):
            offered(source, "cuda_ipc")
        assert "cuda_ipc" not in offered(source, AUTO)

    run(scenario, checksum=True)


def test_auto_takes_the_first_that_both_can(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(source: Here, destination: Here) -> None:
        ends = await Ends.meet(source, destination, AUTO)
        assert ends.source.name == "shared_memory"
        ends.close()

        async def declines(transport: Transport, offer: bytes) -> bytes:
            raise Unavailable("no memory can be shared: the ring is on another host")

        monkeypatch.setattr(SharedMemory, "accept", declines)
        ends = await Ends.meet(source, destination, AUTO)
        assert ends.source.name == "tcp"
        ends.close()

    run(scenario)


def test_what_is_not_automatic_is_taken_if_it_is_chosen() -> None:
    async def scenario(source: Here, destination: Here) -> None:
        assert "gloo" not in offered(source, AUTO)
        assert list(offered(source, "gloo")) == ["gloo"]

    run(scenario)


def test_reasons_of_all_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(source: Here, destination: Here) -> None:
        with pytest.raises(Unavailable, match="nccl: this process has no blocks on a GPU"):
            offered(source, "nccl")
        with pytest.raises(Unavailable, match=r"shared_memory: .*; pigeons: there is no transport"):
            await accepted(destination, {"shared_memory": b"nonsense", "pigeons": b""})
        with pytest.raises(Unavailable, match="nothing was offered"):
            await accepted(destination, {})
        monkeypatch.setitem(TRANSPORTS, "pigeons", "no_such_library.pigeons:Pigeons")
        with pytest.raises(Unavailable, match="no_such_library is not installed"):
            offered(source, "pigeons")

    run(scenario)


@pytest.mark.parametrize("name", sorted(TRANSPORTS.keys() - {"nixl"}))
def test_the_table_names_classes(name: str) -> None:
    assert transport_class(name).name == name


@pytest.mark.skipif(bool(find_spec("nixl")), reason="installed")
def test_a_library_that_is_not_installed() -> None:
    with pytest.raises(Unavailable, match="nixl is not installed"):
        transport_class("nixl")


def test_parts_that_are_not_what_they_should_be() -> None:
    async def scenario(source: Here, destination: Here) -> None:
        part = IncomingPart(here=destination, group=0, num_blocks=2, slot=9, checksum=1)
        ends = await Ends.meet(source, destination, "shared_memory")
        with pytest.raises(ValueError, match="slot 9 of a ring of 2"):
            await ends.destination.receive(part)
        ends.close()
        ends = await Ends.meet(source, destination, "tcp")
        with pytest.raises(ValueError, match="no bytes came"):
            await ends.destination.receive(part)
        ends.close()
        content = source.ring.slot(0)
        with pytest.raises(ValueError, match="384 bytes announced, 383 sent"):
            part.scatter(Staging(content=content[:383]))
        with pytest.raises(ValueError, match="not those that were sent"):
            part.scatter(Staging(content=content[: 2 * BLOCK_NUM_BYTES]))

    run(scenario)


def test_a_channel_whose_other_end_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llumsched.engine.transfer.torch_group.TIMEOUT_S", 0.1)

    async def scenario(source: Here, destination: Here) -> None:
        (transport, _offer) = offered(source, "gloo")["gloo"]
        with pytest.raises(Unavailable, match="no channel to the destination"):
            await transport.connect(b"127.0.0.1:9")
        transport.close()

    run(scenario)
