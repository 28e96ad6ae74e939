"""The ring through which blocks go from one process to another."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llumsched.engine.transfer.shared_ring import ReceiveRing, RingOffer, SendRing, host_id

NUM_SLOTS = 3
SLOT_NUM_BYTES = 4096


@pytest.fixture
def ring() -> Iterator[SendRing]:
    ring = SendRing(num_slots=NUM_SLOTS, slot_num_bytes=SLOT_NUM_BYTES)
    yield ring
    ring.close()


def pattern(slot: int) -> torch.Tensor:
    return torch.arange(SLOT_NUM_BYTES, dtype=torch.int64).add(slot).to(torch.uint8)


def test_receiver_reads_what_the_sender_wrote(ring: SendRing) -> None:
    received = ReceiveRing(ring.offer())
    for slot in range(NUM_SLOTS):
        ring.slot(slot).copy_(pattern(slot))
    for slot in range(NUM_SLOTS):
        assert torch.equal(received.slot(slot), pattern(slot))
    ring.slot(1).zero_()
    assert torch.equal(received.slot(0), pattern(0))
    assert not received.slot(1).any()


def test_another_process_reads_it(ring: SendRing) -> None:
    ring.slot(2).copy_(pattern(2))
    script = (
        "from llumsched.engine.transfer.shared_ring import ReceiveRing, RingOffer\n"
        f"ring = ReceiveRing(RingOffer(**{dataclasses.asdict(ring.offer())!r}))\n"
        "print(bytes(ring.slot(2).numpy()).hex())\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert bytes.fromhex(printed) == bytes(pattern(2).numpy())


def test_receiver_keeps_what_a_dead_sender_wrote() -> None:
    sender = SendRing(num_slots=NUM_SLOTS, slot_num_bytes=SLOT_NUM_BYTES)
    received = ReceiveRing(sender.offer())
    sender.slot(0).copy_(pattern(0))
    sender.close()
    del sender
    gc.collect()
    assert torch.equal(received.slot(0), pattern(0))


def test_a_ring_is_offered_until_it_is_closed() -> None:
    ring = SendRing(num_slots=1, slot_num_bytes=16)
    received = ReceiveRing(ring.offer())
    assert received.is_offered()
    ring.close()
    assert not received.is_offered()
    with Path("/dev/null").open():  # perhaps by the same number
        assert not received.is_offered()


def test_nothing_is_left_of_a_ring() -> None:
    def num_descriptors() -> int:
        links = [fd.readlink() for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
        return sum("llumsched-kv" in str(link) for link in links)

    gc.collect()
    before = num_descriptors()
    sender = SendRing(num_slots=NUM_SLOTS, slot_num_bytes=SLOT_NUM_BYTES)
    received = ReceiveRing(sender.offer())
    assert num_descriptors() > before
    sender.close()
    del sender, received
    gc.collect()
    assert num_descriptors() == before


def test_slots_wait_to_be_freed(ring: SendRing) -> None:
    async def scenario() -> None:
        slots = [await ring.acquire() for _ in range(NUM_SLOTS)]
        assert sorted(slots) == list(range(NUM_SLOTS))
        waiting = asyncio.ensure_future(ring.acquire())
        await asyncio.sleep(0)
        assert not waiting.done()
        ring.free(slots[1])
        assert await waiting == slots[1]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "change",
    [
        {"boot_id": "another host"},
        {"num_slots": 0},
        {"slot_num_bytes": 0},
        {"num_slots": NUM_SLOTS + 1},
        {"slot_num_bytes": SLOT_NUM_BYTES * 2},
        {"inode": 1},
        {"pid": 2**22 + 1},
        {"fd": 10_000},
    ],
)
def test_an_offer_that_does_not_hold_is_refused(ring: SendRing, change: dict[str, Any]) -> None:
    with pytest.raises(OSError):  # noqa: PT011 - several kinds, one answer: use the socket
        ReceiveRing(dataclasses.replace(ring.offer(), **change))


def test_a_descriptor_that_was_used_again_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(NUM_SLOTS * SLOT_NUM_BYTES))
    with other.open("r+b") as file:
        ring = SendRing(num_slots=NUM_SLOTS, slot_num_bytes=SLOT_NUM_BYTES)
        offer: RingOffer = ring.offer()
        ring.close()
        os.dup2(file.fileno(), offer.fd)
        try:
            with pytest.raises(OSError, match="not the ring"):
                ReceiveRing(offer)
        finally:
            os.close(offer.fd)


@pytest.mark.parametrize("slot", [-1, NUM_SLOTS])
def test_a_slot_the_ring_does_not_have(ring: SendRing, slot: int) -> None:
    with pytest.raises(IndexError):
        ReceiveRing(ring.offer()).slot(slot)


def test_a_host_is_the_same_to_all_its_processes() -> None:
    script = "from llumsched.engine.transfer.shared_ring import host_id; print(host_id())"
    other = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert other.stdout.strip() == host_id()
