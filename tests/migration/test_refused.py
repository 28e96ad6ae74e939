"""Requests that cannot move are refused up front, with the reason and a word to count by."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from vllm.v1.request import Request

from llumsched.engine.base import CannotMigrate, Refusal
from llumsched.engine.compatibility import Compatibility, fingerprint_of
from llumsched.engine.vllm.migration import exports
from llumsched.engine.vllm.migration.state import why_not_migratable
from tests.migration.cases import params
from tests.migration.pool import Pool

_WITHOUT_DATA = SimpleNamespace(data=None)


def running(pool: Pool, name: str = "r", num_tokens: int = 60) -> tuple[str, Request]:
    """A request that decodes at the first instance."""
    answer = pool.submit(name, [504, 2416, 282], params(max_tokens=num_tokens))
    pool.until(lambda: pool.num_tokens(name) >= 2)
    (sequence_id,) = answer.sequence_ids
    return sequence_id, pool.instances[0].core.scheduler.requests[sequence_id]


@pytest.mark.parametrize(
    ("refusal", "change", "reason"),
    [
        (Refusal.STREAMING_INPUT, lambda r: setattr(r, "resumable", True), "streaming-input"),
        (Refusal.POOLING, lambda r: setattr(r, "pooling_params", object()), "pooling"),
        (Refusal.MULTIMODAL, lambda r: setattr(r, "mm_features", [_WITHOUT_DATA]), "image"),
        (Refusal.PROMPT_EMBEDS, lambda r: setattr(r, "prompt_embeds", object()), "embeddings"),
    ],
)
def test_a_kind_that_cannot_move(
    pool: Pool,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Refusal,
    change: Callable[[Request], None],
    reason: str,
) -> None:
    sequence_id, request = running(pool)
    port = pool.instances[0].port
    assert [c.request_id for c in port.candidates()] == [sequence_id]

    def as_if_changed(request: Request) -> CannotMigrate | None:
        changed = copy.copy(request)
        change(changed)
        return why_not_migratable(changed)

    monkeypatch.setattr(exports, "why_not_migratable", as_if_changed)
    report = pool.move(sequence_id, 1)
    assert (report.outcome, report.cause) == ("refused", refusal.value)
    assert reason in report.reason
    assert port.candidates() == []
    monkeypatch.undo()
    # It lies in the request: it will not be chosen again.
    pool.step()
    assert port.candidates() == []
    assert port._rests[request].until_s == math.inf
    pool.finish("r")


def test_a_request_that_is_not_there(pool: Pool) -> None:
    report = pool.move("no-such-request", 1, at=0)
    assert (report.outcome, report.cause) == ("refused", Refusal.NOT_HERE.value)


def test_a_request_is_moved_once_at_a_time(pool: Pool) -> None:
    sequence_id, _ = running(pool)
    first = pool.start_move(sequence_id, 1)
    second = pool.start_move(sequence_id, 2, at=0)
    pool.until(lambda: first.done() and second.done())
    outcomes = sorted([first.result().outcome, second.result().outcome])
    assert outcomes == ["committed", "refused"]
    refused = first.result() if first.result().outcome == "refused" else second.result()
    assert refused.cause in (Refusal.BEING_MIGRATED.value, Refusal.NOT_HERE.value)
    pool.finish("r")


def test_refusals_rest_a_request_for_longer_each_time(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence_id, request = running(pool)
    port = pool.instances[0].port
    now_s = 1000.0
    monkeypatch.setattr("llumsched.engine.vllm.migration.exports.time.monotonic", lambda: now_s)
    rests_s = []
    for _ in range(10):
        port.rest(sequence_id, Refusal.NO_ROOM)
        assert port.candidates() == []
        rests_s.append(port._rests[request].until_s - now_s)
        now_s = port._rests[request].until_s
        assert [c.request_id for c in port.candidates()] == [sequence_id]
    assert rests_s == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    monkeypatch.undo()
    pool.finish("r")


def test_an_instance_that_cannot_migrate_says_so(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence_id, _ = running(pool)
    monkeypatch.setattr(pool.instances[0].port, "refusal", "speculative decoding is on")
    report = pool.move(sequence_id, 1)
    assert (report.outcome, report.cause) == ("refused", Refusal.UNSUPPORTED_ENGINE.value)
    assert "speculative decoding is on" in report.reason
    pool.finish("r")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "torch.bfloat16"),
        ("block_size", 64),
        ("kv_dtype", "fp8"),
        ("kv_layout", "another"),
        ("model", "another/model"),
        ("vllm", "0.31.0"),
        ("tensor_parallel", 2),
        ("protocol", 1),
    ],
)
def test_instances_that_are_not_alike_refuse_each_other(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, field: str, value: Any
) -> None:
    pool.configure()  # who has met before does not compare again
    here = msgspec.json.decode(pool.instances[1].port.fingerprint(), type=Compatibility)
    other = fingerprint_of(msgspec.structs.replace(here, **{field: value}))
    monkeypatch.setattr(pool.instances[1].migrator, "_fingerprint", other)
    sequence_id, _ = running(pool)
    report = pool.move(sequence_id, 1)
    assert (report.outcome, report.cause) == ("refused", Refusal.INCOMPATIBLE.value)
    assert f"{field} is {value!r} here and {getattr(here, field)!r} there" in report.reason
    # Nothing was asked of the engines, and a third instance is as good as before.
    assert pool.move(sequence_id, 2).outcome == "committed"
    pool.finish("r")


def test_a_destination_that_does_not_answer_is_given_up(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llumsched.migration.link.HANDSHAKE_TIMEOUT_S", 0.2)
    sequence_id, _ = running(pool)
    endpoint = pool.instances[1].migrator.endpoint
    pool.instances[1].migrator.endpoint = "tcp://127.0.0.1:9"
    report = pool.move(sequence_id, 1)
    pool.instances[1].migrator.endpoint = endpoint
    assert (report.outcome, report.cause) == ("refused", Refusal.UNREACHABLE.value)
    started_s = time.monotonic()
    assert pool.move(sequence_id, 1).outcome == "committed"
    assert time.monotonic() > started_s
    pool.finish("r")


def test_a_destination_that_dies_in_the_handshake_is_given_up_at_once(pool: Pool) -> None:
    sequence_id, _ = running(pool)
    source, destination = pool.instances[0], pool.instances[1]
    endpoint, destination.migrator.endpoint = destination.migrator.endpoint, "tcp://127.0.0.1:9"
    moving = pool.start_move(sequence_id, 1)
    pool.until(lambda: destination.name in source.migrator._links)
    for _ in range(2):
        pool.step()
    pool._loop.call_soon_threadsafe(source.migrator.peer_gone, destination.name)
    pool.until(moving.done)
    destination.migrator.endpoint = endpoint
    assert (moving.result().outcome, moving.result().cause) == ("refused", "unreachable")
    pool.finish("r")
