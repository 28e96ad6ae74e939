"""Every transport moves blocks exactly, says why it cannot, and is found by its name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from llumsched.core.transfer_options import AUTO, TRANSPORTS
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

ON_THIS_MACHINE = ("shared_memory", "tcp", "gloo")


def run(scenario: Callable[[Here, Here], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def play() -> None:
        with (
            instance(random_blocks(1), **options) as source,
            instance(random_blocks(2), **options) as destination,
        ):
            async with asyncio.timeout(60):
                await scenario(source, destination)

    asyncio.run(play())


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("name", ON_THIS_MACHINE)
def test_blocks_arrive_and_nothing_else_changes(name: str, checksum: bool) -> None:
    """More parts than there are slots, and a last part that does not fill its slot."""

    async def scenario(source: Here, destination: Here) -> None:
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

    run(scenario, checksum=checksum)


def test_auto_takes_the_first_that_both_can(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(source: Here, destination: Here) -> None:
        ends = await Ends.meet(source, destination, AUTO)
        assert ends.source.name == "shared_memory"
        ends.close()

        def declines(transport: Transport, offer: bytes) -> bytes:
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
            accepted(destination, {"shared_memory": b"nonsense", "pigeons": b""})
        with pytest.raises(Unavailable, match="nothing was offered"):
            accepted(destination, {})
        monkeypatch.setitem(TRANSPORTS, "pigeons", "no_such_library.pigeons:Pigeons")
        with pytest.raises(Unavailable, match="no_such_library is not installed"):
            offered(source, "pigeons")

    run(scenario)


@pytest.mark.parametrize("name", TRANSPORTS)
def test_the_table_names_classes(name: str) -> None:
    """Each imports without what it needs besides torch, so it can say what is missing."""
    assert transport_class(name).name == name


def test_parts_that_are_not_what_they_should_be() -> None:
    async def scenario(source: Here, destination: Here) -> None:
        part = IncomingPart(here=destination, num_blocks=2, slot=9, checksum=1)
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
