"""A client that leaves, whenever it does, leaves nothing behind: the ``pool`` fixture waits until
both instances report every block free and no request."""

from __future__ import annotations

import threading
import time

import pytest

from tests.campaigns import THOROUGH
from tests.e2e.cases import COMPLETIONS, completion
from tests.e2e.client import Admin, Answer, belongs
from tests.e2e.moving import move

PROMPT = [1000 + i % 991 for i in range(400)]
BODY = completion(prompt=PROMPT, max_tokens=400)


def test_while_the_prompt_is_computed(pool: Admin) -> None:
    with pool.stream(COMPLETIONS, completion(prompt=PROMPT[::-1], max_tokens=400)):
        (request,) = pool.requests()
    assert request["num_output_tokens"] == 0


def test_before_a_migration(pool: Admin) -> None:
    with pool.stream(COMPLETIONS, BODY) as stream:
        request_id = next(stream)["id"]
    pool.await_idle()
    assert pool.migrate(request_id).status == 404


@pytest.mark.parametrize(
    "delay_ms", [0, 5, 10, 20, 40, 80, 160, 320] if THOROUGH else [0, 20, 80, 320]
)
def test_during_a_migration(pool: Admin, delay_ms: int) -> None:
    answers: list[Answer] = []
    with pool.stream(COMPLETIONS, BODY) as stream:
        request_id = next(stream)["id"]
        moving = threading.Thread(target=lambda: answers.append(pool.migrate(request_id)))
        moving.start()
        time.sleep(delay_ms / 1000)
    moving.join()
    # It had moved, or it had not: either way the operator is told.
    assert answers[0].status in (200, 404, 409), answers


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_after_a_migration(pool: Admin, num_tokens: int) -> None:
    with pool.stream(COMPLETIONS, BODY) as stream:
        answer = move(pool, next(stream)["id"])
        assert answer.status == 200, answer
        for _ in range(num_tokens):
            next(stream)


def test_with_some_sequences_moved(pool: Admin) -> None:
    body = completion(n=3, temperature=0.9, seed=1, max_tokens=400)
    with pool.stream(COMPLETIONS, body) as stream:
        request_id = next(stream)["id"]
        sequences = [r["request_id"] for r in pool.requests() if belongs(r, request_id)]
        moved = [answer for s in sequences[:2] if (answer := move(pool, s)).status == 200]
    assert moved
