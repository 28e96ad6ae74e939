"""The ways a request goes through a pool in more than one test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.outputs import RequestOutput

from tests.migration.answers import seen_by_client
from tests.migration.cases import Case
from tests.migration.pool import Pool

# Tokens after which a request goes to the next instance: there, on, and back to the first.
AT = (3, 8, 13)


def ask(pool: Pool, request_id: str, case: Case, at: int = 0) -> list[str]:
    """Send a case; the ids of its sequences."""
    prompt = case.prompt(pool.tokenizer)
    return pool.submit(request_id, prompt, case.params, at=at, **case.fields).sequence_ids


def in_a_circle(pool: Pool, request_id: str, case: Case) -> RequestOutput:
    """The answer of a case that goes from instance to instance, each of its sequences by itself.

    All moves must succeed, but for those that the end of a short answer comes before.
    """
    sequences = ask(pool, request_id, case)
    for num_tokens in AT:
        pool.until(lambda n=num_tokens: pool.num_tokens(request_id) >= n)  # type: ignore[misc]
        for sequence_id in sequences:
            if pool.routes.get(sequence_id) is None:
                continue
            next_one = (pool.where(sequence_id) + 1) % len(pool.instances)
            report = pool.move(sequence_id, next_one)
            assert report.outcome == "committed" or pool.routes.get(sequence_id) is None, report
    (answer,) = pool.finish(request_id)
    return answer


def answers_of(pool: Pool, cases: Mapping[str, Case]) -> dict[str, Any]:
    """The answers of cases that stay where they are, all asked at once of one instance."""
    for name, case in cases.items():
        ask(pool, name, case)
    answers = dict(zip(cases, pool.finish(*cases), strict=True))
    pool.settle()
    return {name: seen_by_client(answer) for name, answer in answers.items()}
