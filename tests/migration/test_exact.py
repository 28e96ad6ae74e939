"""A request that moves says what it would have said had it stayed, whatever kind it is of."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.campaigns import THOROUGH
from tests.migration.answers import seen_by_client
from tests.migration.cases import CASES, NUM_TOKENS
from tests.migration.pool import BLOCK_SIZE, Pool

# Tokens after which a request goes to the next instance: there, on, and back to the first.
AT = (3, 8, 13)
SEED = 20240610


def ask(pool: Pool, name: str, request_id: str | None = None, at: int = 0) -> list[str]:
    """Send a case; the ids of its sequences."""
    case = CASES[name]
    answer = pool.submit(
        request_id or name, case.prompt(pool.tokenizer), case.params, at=at, **case.fields
    )
    return answer.sequence_ids


@pytest.mark.parametrize("name", CASES)
def test_alone_in_a_circle(pool: Pool, unmoved: dict[str, Any], name: str) -> None:
    sequences = ask(pool, name)
    for num_tokens in AT:
        pool.until(lambda n=num_tokens: pool.num_tokens(name) >= n)  # type: ignore[misc]
        for sequence_id in sequences:
            if pool.routes.get(sequence_id) is None:
                continue  # a short answer
            report = pool.move(sequence_id, (pool.where(sequence_id) + 1) % 3)
            assert report.outcome == "committed" or pool.routes.get(sequence_id) is None, report
    (answer,) = pool.finish(name)
    assert answer.request_id == name
    assert seen_by_client(answer) == unmoved[name]
    # The prompt was counted once, where it was computed; each token where it was decoded.
    num_prompt_tokens = len(CASES[name].prompt(pool.tokenizer)) * len(sequences)
    assert sum(stats.num_prompt_tokens for stats in pool.stats) == num_prompt_tokens
    assert sum(stats.num_generation_tokens for stats in pool.stats) >= sum(
        len(choice.token_ids) for choice in answer.outputs
    )


@pytest.mark.parametrize("round_", range(3 if THOROUGH else 1))
def test_in_a_batch_at_random(pool: Pool, unmoved: dict[str, Any], round_: int) -> None:
    """A dozen requests on three instances, moved again and again past each other."""
    chance = random.Random(SEED + round_)
    names = list(CASES)[round_::3] + ["greedy"] * (round_ == 1)
    names = list(dict.fromkeys(names))
    sequences = [s for i, name in enumerate(names) for s in ask(pool, name, at=i % 3)]
    num_moved = 0
    while not all(pool.answers[name].done for name in names):
        movable = [
            s
            for s in sequences
            if (route := pool.routes.get(s)) is not None
            and 0 < route.num_tokens < NUM_TOKENS - 4
            and pool.instances[pool.where(s)].migrator._incoming.may_leave(s)
        ]
        chosen = chance.sample(movable, min(3, len(movable)))
        moves = [
            pool.start_move(s, chance.choice([i for i in range(3) if i != pool.where(s)]))
            for s in chosen
        ]
        pool.until(lambda m=moves: all(move.done() for move in m))  # type: ignore[misc]
        num_moved += sum(move.result().outcome == "committed" for move in moves)
        pool.step()
    assert num_moved > len(names)
    for name, answer in zip(names, pool.finish(*names), strict=True):
        assert seen_by_client(answer) == unmoved[name], name


def test_there_and_back_many_times(pool: Pool, unmoved: dict[str, Any]) -> None:
    (sequence_id,) = ask(pool, "long answer")
    for num_moves in range(1, 11):
        pool.until(lambda n=num_moves: pool.num_tokens("long answer") >= 3 * n)  # type: ignore[misc]
        report = pool.move(sequence_id, num_moves % 2)
        assert report.outcome == "committed", report
    (answer,) = pool.finish("long answer")
    assert seen_by_client(answer) == unmoved["long answer"]


def test_only_what_the_destination_does_not_have_is_sent(pool: Pool) -> None:
    """It has computed the same prompt before: of that, nothing is copied but what is new."""
    num_prompt_blocks = len(CASES["long prompt"].prompt(pool.tokenizer)) // BLOCK_SIZE
    ask(pool, "long prompt", "earlier", at=1)
    (earlier,) = pool.finish("earlier")
    (sequence_id,) = ask(pool, "long prompt")
    pool.until(lambda: pool.num_tokens("long prompt") >= 3)
    used = pool.instances[1].num_free_blocks
    report = pool.move(sequence_id, 1)
    assert report.statistics is not None
    assert report.statistics.num_cached_blocks >= num_prompt_blocks
    assert report.statistics.num_blocks <= 2
    assert used - pool.instances[1].num_free_blocks > num_prompt_blocks
    (answer,) = pool.finish("long prompt")
    assert seen_by_client(answer) == seen_by_client(earlier)


def test_a_shared_prefix_stays_with_the_others(pool: Pool) -> None:
    """Two requests share the blocks of their prompt; one leaves, and the other goes on."""
    (first,) = ask(pool, "long prompt", "first")
    pool.until(lambda: pool.num_tokens("first") >= 2)
    ask(pool, "long prompt", "second")
    pool.until(lambda: pool.num_tokens("second") >= 2)
    assert pool.move(first, 1).outcome == "committed"
    answers = pool.finish("first", "second")
    assert seen_by_client(answers[0]) == seen_by_client(answers[1])
    assert answers[1].num_cached_tokens
