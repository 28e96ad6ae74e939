"""The same answer whichever way the bytes go, and what becomes of bytes that are wrong or slow."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from llumsched.core.migration.source.record import MigrationOptions
from llumsched.core.transfer_options import TRANSPORTS, TransferOptions
from llumsched.engine.transfer.shared_memory import SharedMemory
from llumsched.engine.transfer.shared_ring import SendRing
from llumsched.engine.transfer.transport import IncomingPart, Write
from llumsched.migration import link as peer_link
from tests.migration.answers import seen_by_client
from tests.migration.cases import CASES, params
from tests.migration.pool import Pool


@pytest.fixture(autouse=True)
def as_before(pool: Pool) -> Iterator[None]:
    yield
    pool.settle()
    pool.configure()


def move_long(pool: Pool, name: str = "long prompt") -> tuple[Any, Any]:
    """A long prompt's report of a move there, and its answer after it has come back as well."""
    case = CASES[name]
    answer = pool.submit(name, case.prompt(pool.tokenizer), case.params)
    (sequence_id,) = answer.sequence_ids
    pool.until(lambda: pool.num_tokens(name) >= 3)
    there = pool.move(sequence_id, 1)
    assert there.outcome == "committed", there
    back = pool.move(sequence_id, 0)
    assert back.outcome == "committed", back
    return there, seen_by_client(pool.finish(name)[0])


@pytest.mark.parametrize(
    ("transport", "checksum"),
    [
        *itertools.product(("shared_memory", "tcp", "gloo"), (False, True)),
        pytest.param(
            *("nixl", False),
            marks=pytest.mark.skipif(not find_spec("nixl"), reason="not installed"),
        ),
    ],
)
def test_each_transport(
    pool: Pool, unmoved: dict[str, Any], transport: str, checksum: bool
) -> None:
    # Two slots of a block each: every slot is used again and again.
    pool.configure(
        transfer=TransferOptions(
            transport=transport,
            checksum=checksum,
            staging_slots=2,
            staging_slot_mb=0.1,
            core_share=1.0,
        )
    )
    pool.connect(0, 1)
    pool.connect(1, 0)
    report, answer = move_long(pool, "long prompt, seed")
    assert report.statistics.transport == transport
    assert report.statistics.num_blocks > 10
    assert answer == unmoved["long prompt, seed"]


def test_shared_memory_is_chosen_inside_a_host(pool: Pool) -> None:
    assert move_long(pool)[0].statistics.transport == "shared_memory"


def test_tcp_is_chosen_between_hosts(
    pool: Pool, unmoved: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SendRing.offer

    def of_another_host(ring: SendRing) -> Any:
        return dataclasses.replace(real(ring), boot_id="another host")

    monkeypatch.setattr(SendRing, "offer", of_another_host)
    monkeypatch.delitem(TRANSPORTS, "nixl")  # which comes first where it is installed
    report, answer = move_long(pool)
    assert report.statistics.transport == "tcp"
    assert answer == unmoved["long prompt"]


def test_transports_that_differ_are_refused(pool: Pool) -> None:
    answer = pool.submit("r", [504, 2416], params(max_tokens=60))
    pool.until(lambda: pool.num_tokens("r") >= 2)
    pool.instances[1].migrator._transfer = TransferOptions(transport="tcp")
    report = pool.move(answer.sequence_ids[0], 1)
    assert (report.outcome, report.cause) == ("refused", "incompatible")
    assert "its transport is tcp, the source's is auto" in report.reason
    pool.finish("r")


def test_bytes_that_were_changed_end_the_migration(
    pool: Pool, unmoved: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The destination frees what it held at once, and the request goes on where it is."""
    pool.configure(transfer=TransferOptions(checksum=True))
    real = SharedMemory.receive

    async def changed(transport: SharedMemory, part: IncomingPart) -> Write:
        transport._ring.slot(part.slot)[7] ^= 1
        return await real(transport, part)

    monkeypatch.setattr(SharedMemory, "receive", changed)
    case = CASES["long prompt"]
    answer = pool.submit("long prompt", case.prompt(pool.tokenizer), case.params)
    pool.until(lambda: pool.num_tokens("long prompt") >= 3)
    report = pool.move(answer.sequence_ids[0], 1)
    assert (report.outcome, report.cause) == ("refused", "reservation_rejected")
    assert "not those that were sent" in report.reason
    pool.until(lambda: not pool.instances[1].port._imports, "the reservation is given up")
    assert seen_by_client(pool.finish("long prompt")[0]) == unmoved["long prompt"]


def test_a_request_that_decodes_faster_than_the_link_is_left_alone(
    pool: Pool, unmoved: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages must shrink; with more left than a pause is worth, the migration is given up."""
    pool.configure(
        options=MigrationOptions(final_stage_blocks=0, max_final_stage_blocks=0, max_stages=2)
    )
    real = peer_link.PeerConnection.send_blocks

    def decode_much() -> None:
        enough = min(pool.num_tokens("fast") + 70, 400)
        while pool.num_tokens("fast") < enough:
            time.sleep(0.005)

    async def slowly(link: peer_link.PeerConnection, *arguments: Any, **keywords: Any) -> None:
        await asyncio.to_thread(decode_much)
        await real(link, *arguments, **keywords)

    monkeypatch.setattr(peer_link.PeerConnection, "send_blocks", slowly)
    prompt = list(range(504, 504 + 30))
    answer = pool.submit("fast", prompt, params(max_tokens=400))
    pool.until(lambda: pool.num_tokens("fast") >= 40)
    report = pool.move(answer.sequence_ids[0], 1)
    assert (report.outcome, report.cause) == ("aborted", "decodes_faster_than_link")
    assert pool.where(answer.sequence_ids[0]) == 0
    assert 0 < pool.num_tokens("fast") < 400
    pool.abort("fast")


def test_a_slow_link_moves_a_request_by_a_larger_last_stage(
    pool: Pool, unmoved: dict[str, Any]
) -> None:
    """The stages stop to shrink, but what is left is worth a pause."""
    pool.configure(
        options=MigrationOptions(max_stages=1, final_stage_blocks=0, max_final_stage_blocks=32)
    )
    report, answer = move_long(pool)
    assert report.statistics.num_stages <= 2
    assert answer == unmoved["long prompt"]


def test_the_limit_of_bandwidth_is_kept_to(pool: Pool, unmoved: dict[str, Any]) -> None:
    """A long prompt's blocks take the seconds that the limit says, in which it decodes on."""
    pool.configure(transfer=TransferOptions(bandwidth_limit_mb_s=40.0, staging_slot_mb=2.0))
    case = CASES["long prompt"]
    answer = pool.submit("slow", case.prompt(pool.tokenizer), case.params)
    pool.until(lambda: pool.num_tokens("slow") >= 2)
    moving = pool.start_move(answer.sequence_ids[0], 1)
    before = pool.num_tokens("slow")
    pool.until(moving.done)
    report = moving.result()
    assert report.outcome == "committed", report
    assert report.statistics is not None
    # Everything but the first part, which is sent at once, and the last stage waits its turn.
    paced_bytes = report.statistics.num_bytes - 3 * 2_000_000 - 2 * 1_474_560
    assert report.statistics.total_s >= paced_bytes / 40e6
    assert report.statistics.num_output_tokens > before
    assert seen_by_client(pool.finish("slow")[0]) == unmoved["long prompt"]
