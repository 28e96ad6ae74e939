"""Requests that have no KV, or only some, move too: they begin, or go on, at the destination."""

from __future__ import annotations

from typing import Any

import pytest

from llumsched.engine.vllm.migration import exports
from tests.migration.answers import seen_by_client
from tests.migration.cases import CASES, params
from tests.migration.pool import NUM_BLOCKS, Pool

LONG = [504 + i * 31 % 997 for i in range(900)]


@pytest.mark.parametrize("name", ["greedy", "seed", "grammar", "long prompt", "prompt logprobs"])
def test_a_request_that_waits_is_sent_on(pool: Pool, unmoved: dict[str, Any], name: str) -> None:
    """The batch of its instance is full, so it has not begun."""
    core = pool.instances[0].core
    others = [f"other-{i}" for i in range(core.scheduler.max_num_running_reqs)]
    for other in others:
        pool.submit(other, [504, 2416], params(max_tokens=24))
    pool.until(lambda: len(core.scheduler.running) == len(others))
    case = CASES[name]
    answer = pool.submit(name, case.prompt(pool.tokenizer), case.params, **case.fields)
    pool.step()
    report = pool.move(answer.sequence_ids[0], 1)
    assert report.outcome == "committed", report
    assert report.statistics is not None
    assert report.statistics.num_bytes == 0
    moved, *_ = pool.finish(name, *others)
    assert seen_by_client(moved) == unmoved[name]


def test_a_waiting_request_that_is_refused_waits_on(pool: Pool) -> None:
    core = pool.instances[0].core
    others = [f"other-{i}" for i in range(core.scheduler.max_num_running_reqs)]
    for other in others:
        pool.submit(other, [504, 2416], params(max_tokens=12))
    pool.until(lambda: len(core.scheduler.running) == len(others))
    answer = pool.submit("waiting", [504, 2416], params())
    (sequence_id,) = answer.sequence_ids
    # The destination has a request of this id: it says no.
    destination = pool.instances[1]
    twin = pool.submit("twin", [504], params(max_tokens=64), at=1)
    scheduler = destination.core.scheduler
    scheduler.requests[sequence_id] = scheduler.requests[twin.sequence_ids[0]]
    report = pool.move(sequence_id, 1)
    assert report.outcome == "refused"
    del scheduler.requests[sequence_id]
    pool.finish("waiting", "twin", *others)


@pytest.mark.parametrize("name", ["seed", "penalties, seed", "JSON schema", "long prompt"])
def test_a_request_preempted_before_moves(pool: Pool, unmoved: dict[str, Any], name: str) -> None:
    case = CASES[name]
    answer = pool.submit(name, case.prompt(pool.tokenizer), case.params, **case.fields)
    (sequence_id,) = answer.sequence_ids
    pool.until(lambda: pool.num_tokens(name) >= 4)
    preempt(pool, 0, sequence_id)
    pool.until(lambda: pool.num_tokens(name) >= 8)
    assert pool.move(sequence_id, 1).outcome == "committed"
    (moved,) = pool.finish(name)
    assert seen_by_client(moved) == unmoved[name]


@pytest.mark.parametrize("name", ["seed", "penalties, seed", "JSON schema", "long prompt"])
def test_a_request_moves_while_it_is_preempted(
    pool: Pool, unmoved: dict[str, Any], name: str
) -> None:
    """The request has tokens and no KV: the destination computes it again."""
    case = CASES[name]
    answer = pool.submit(name, case.prompt(pool.tokenizer), case.params, **case.fields)
    (sequence_id,) = answer.sequence_ids
    pool.until(lambda: pool.num_tokens(name) >= 4)
    preempt(pool, 0, sequence_id)
    moving = pool.start_move(sequence_id, 1)
    wait_for_call(pool, 0)
    pool.until(moving.done)
    report = moving.result()
    assert report.outcome == "committed", report
    assert report.statistics is not None
    assert report.statistics.num_bytes == 0
    (moved,) = pool.finish(name)
    assert seen_by_client(moved) == unmoved[name]


def test_a_long_prompt_that_has_only_begun_begins_anew(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The engine steps on until the order reaches it: this is about what happens then, not when.
    monkeypatch.setattr(exports, "RESTART_SHARE", 1.0)
    expected = pool.submit("expected", LONG, params(max_tokens=8), at=2)
    pool.finish("expected")
    scheduler = pool.instances[0].core.scheduler
    pool.submit("other", [504], params(max_tokens=200))
    pool.until(lambda: pool.num_tokens("other") >= 1)
    scheduler.scheduler_config.long_prefill_token_threshold = 128
    try:
        answer = pool.submit("long", LONG, params(max_tokens=8))
        (sequence_id,) = answer.sequence_ids
        pool.step()
        assert 0 < scheduler.requests[sequence_id].num_computed_tokens < len(LONG) / 2
        report = pool.move(sequence_id, 1)
        assert report.outcome == "committed", report
        assert report.statistics is not None
        assert report.statistics.num_bytes == 0
        (moved,) = pool.finish("long")
    finally:
        scheduler.scheduler_config.long_prefill_token_threshold = 0
    assert expected.final is not None
    assert seen_by_client(moved) == seen_by_client(expected.final)
    pool.abort("other")


def test_a_long_prompt_moves_after_its_first_token(pool: Pool) -> None:
    expected = pool.submit("expected", LONG, params(max_tokens=40), at=2)
    pool.finish("expected")
    scheduler = pool.instances[0].core.scheduler
    pool.submit("other", [504], params(max_tokens=200))
    pool.until(lambda: pool.num_tokens("other") >= 1)
    scheduler.scheduler_config.long_prefill_token_threshold = 128
    try:
        answer = pool.submit("long", LONG, params(max_tokens=40))
        (sequence_id,) = answer.sequence_ids
        pool.until(lambda: scheduler.requests[sequence_id].num_computed_tokens >= len(LONG) / 2)
        report = pool.move(sequence_id, 1)
    finally:
        scheduler.scheduler_config.long_prefill_token_threshold = 0
    assert report.outcome == "committed", report
    assert report.statistics is not None
    assert report.statistics.num_blocks >= len(LONG) // 32
    (moved,) = pool.finish("long")
    assert expected.final is not None
    assert seen_by_client(moved) == seen_by_client(expected.final)
    pool.abort("other")


def test_a_destination_without_room_refuses_and_the_request_goes_on(
    pool: Pool, unmoved: dict[str, Any]
) -> None:
    pool.submit("large", [504 + i % 991 for i in range(1000)], params(max_tokens=20), at=1)
    pool.submit("larger", [505 + i % 983 for i in range(1000)], params(max_tokens=20), at=1)
    pool.submit("largest", [506 + i % 977 for i in range(900)], params(max_tokens=100), at=1)
    pool.until(lambda: all(pool.num_tokens(i) >= 1 for i in ("large", "larger", "largest")))
    assert pool.instances[1].num_free_blocks < NUM_BLOCKS // 4
    case = CASES["long prompt"]
    answer = pool.submit("long prompt", case.prompt(pool.tokenizer), case.params)
    pool.until(lambda: pool.num_tokens("long prompt") >= 2)
    report = pool.move(answer.sequence_ids[0], 1)
    assert (report.outcome, report.cause) == ("refused", "no_room")
    assert "free" in report.reason
    moved, *_ = pool.finish("long prompt", "large", "larger", "largest")
    assert seen_by_client(moved) == unmoved["long prompt"]


def preempt(pool: Pool, index: int, sequence_id: str) -> None:
    """Take a request's blocks away, as a step does that has too few."""
    scheduler = pool.instances[index].core.scheduler
    request = scheduler.requests[sequence_id]
    scheduler.running.remove(request)
    scheduler._preempt_request(request, 0.0)
    scheduler.prev_step_scheduled_req_ids.discard(sequence_id)


def wait_for_call(pool: Pool, index: int) -> None:
    """Wait until the migrator has asked something of an engine."""
    queue = pool.instances[index].core.input_queue
    pool_is_idle = pool.instances[index]
    pool_is_idle.hangs = True
    try:
        pool.until(lambda: not queue.empty(), "the migrator asks")
    finally:
        pool_is_idle.hangs = False
