"""A request that moves says what it would have said had it stayed, whatever kind it is of."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.campaigns import THOROUGH
from tests.migration.answers import seen_by_client
from tests.migration.cases import CASES, NUM_TOKENS
from tests.migration.pool import BLOCK_SIZE, Pool
from tests.migration.ways import ask, in_a_circle

SEED = 20240610
# Why a short answer was not moved.
ENDED = ("request_finished", "not_here")


@pytest.mark.parametrize("name", CASES)
def test_alone_in_a_circle(pool: Pool, unmoved: dict[str, Any], name: str) -> None:
    case = CASES[name]
    answer = in_a_circle(pool, name, case)
    assert answer.request_id == name
    assert seen_by_client(answer) == unmoved[name]
    # The prompt was counted once, where it was computed; each token where it was decoded.
    num_prompt_tokens = len(case.prompt(pool.tokenizer)) * len(answer.outputs)
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
    sequences = [s for i, name in enumerate(names) for s in ask(pool, name, CASES[name], at=i % 3)]
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
        reports = pool.until_moved(*moves)
        for report in reports:
            # How many moves an answer is long enough for depends on how fast the machine is.
            assert report.outcome == "committed" or report.cause in ENDED, report
            num_moved += report.outcome == "committed"
        pool.step()
    assert num_moved > len(names) // 2
    for name, answer in zip(names, pool.finish(*names), strict=True):
        assert seen_by_client(answer) == unmoved[name], name


def test_there_and_back_many_times(pool: Pool, unmoved: dict[str, Any]) -> None:
    (sequence_id,) = ask(pool, "long answer", CASES["long answer"])
    for num_moves in range(1, 11):
        pool.until(lambda n=num_moves: pool.num_tokens("long answer") >= 3 * n)  # type: ignore[misc]
        report = pool.move(sequence_id, num_moves % 2)
        assert report.outcome == "committed", report
    (answer,) = pool.finish("long answer")
    assert seen_by_client(answer) == unmoved["long answer"]


def test_only_what_the_destination_does_not_have_is_sent(pool: Pool) -> None:
    """The destination has computed the same prompt before: only what is new is copied."""
    num_prompt_blocks = len(CASES["long prompt"].prompt(pool.tokenizer)) // BLOCK_SIZE
    ask(pool, "earlier", CASES["long prompt"], at=1)
    (earlier,) = pool.finish("earlier")
    (sequence_id,) = ask(pool, "long prompt", CASES["long prompt"])
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
    (first,) = ask(pool, "first", CASES["long prompt"])
    pool.until(lambda: pool.num_tokens("first") >= 2)
    ask(pool, "second", CASES["long prompt"])
    pool.until(lambda: pool.num_tokens("second") >= 2)
    assert pool.move(first, 1).outcome == "committed"
    answers = pool.finish("first", "second")
    assert seen_by_client(answers[0]) == seen_by_client(answers[1])
    assert answers[1].num_cached_tokens
