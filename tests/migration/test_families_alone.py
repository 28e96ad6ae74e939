"""Models of which an answer may depend on its batch move as exactly as others.

Of models with states (Mamba, gated delta nets, short convolutions) and with MLA, vLLM computes some
things on a CPU otherwise in a batch than alone. So a request is compared with itself where it is
alone in its engine at either end, or in a batch of as many, at the same place, at both.
``LLUMSCHED_THOROUGH=1`` takes every family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from llumsched.engine.transfer.access import LocalKV
from tests.campaigns import THOROUGH
from tests.migration.answers import seen_by_client
from tests.migration.cases import CASES, Case, params
from tests.migration.leaving_out import moved
from tests.migration.pool import Pool
from tests.migration.test_waiting import preempt
from tests.migration.ways import ask, in_a_circle

NUM_MOVES = 20 if THOROUGH else 6
NUM_OTHERS = 2
LONG = Case(params(max_tokens=120), is_long=True)


@pytest.fixture
def engines(alone_pool: Pool) -> Pool:
    return alone_pool


@pytest.fixture
def unmoved(alone_unmoved: dict[str, Any]) -> dict[str, Any]:
    return alone_unmoved


def test_alone_there_and_back(pool: Pool, unmoved: Mapping[str, Any]) -> None:
    for name in unmoved:
        assert seen_by_client(in_a_circle(pool, name, CASES[name])) == unmoved[name], name


def test_many_moves_of_one(pool: Pool) -> None:
    """The answer fills some blocks, so that the state goes on in others where it is cached."""
    ask(pool, "stayed", LONG)
    (stayed,) = pool.finish("stayed")
    pool.settle()
    pool.forget_everything()
    (sequence_id,) = ask(pool, "r", LONG)
    for number in range(NUM_MOVES):
        pool.until(lambda n=number: pool.num_tokens("r") >= 2 + 5 * n)  # type: ignore[misc]
        report = pool.move(sequence_id, 1 - pool.where(sequence_id))
        assert report.outcome == "committed", report
    (answer,) = pool.finish("r")
    assert seen_by_client(answer) == seen_by_client(stayed)


def test_preempted_before_and_after(pool: Pool) -> None:
    """Tokens that are computed again are so in one part, so they may differ: not by the move."""

    def answered(*, moves: bool) -> Any:
        (sequence_id,) = ask(pool, "r", CASES["repetition penalty"])
        pool.until(lambda: pool.num_tokens("r") >= 3)
        preempt(pool, 0, sequence_id)
        pool.until(lambda: pool.num_tokens("r") >= 5)
        if moves:
            assert pool.move(sequence_id, 1).outcome == "committed"
        pool.until(lambda: pool.num_tokens("r") >= 22)
        assert pool.num_tokens("r") == 22
        preempt(pool, int(moves), sequence_id)
        (answer,) = pool.finish("r")
        return seen_by_client(answer)

    stayed = answered(moves=False)
    pool.settle()
    pool.forget_everything()
    assert answered(moves=True) == stayed


def test_in_a_batch_of_as_many(pool: Pool, unmoved: Mapping[str, Any]) -> None:
    """There and back, past others that stay: the third of three at either end."""

    def answers(*, moves: bool) -> list[Any]:
        others = [f"{n} at {index}" for index in (0, 1) for n in range(NUM_OTHERS)]
        for other in others:
            number, index = int(other[0]), int(other[-1])
            pool.submit(other, [504 + number, 2416], params(max_tokens=900), at=index)
        pool.until(lambda: all(pool.num_tokens(other) >= 2 for other in others))
        found: list[Any] = []
        for name in unmoved:
            (sequence_id,) = ask(pool, name, CASES[name])
            for least in (3, 9) if moves else ():
                pool.until(lambda i=name, n=least: pool.num_tokens(i) >= n)  # type: ignore[misc]
                report = pool.move(sequence_id, 1 - pool.where(sequence_id))
                assert report.outcome == "committed", report
            found += map(seen_by_client, pool.finish(name))
        for other in others:
            pool.abort(other)
        return found

    stayed = answers(moves=False)
    pool.settle()
    pool.forget_everything()
    for name, one, other in zip(unmoved, answers(moves=True), stayed, strict=True):
        assert one == other, name


def test_each_group_is_needed(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the states, or the blocks, of any one group left out, log probabilities differ.

    The tokens need not: a short convolution looks back at two tokens.
    """
    kv = pool.instances[1].port.kv
    assert isinstance(kv, LocalKV)
    case = Case(params(logprobs=3), is_long=True)
    ask(pool, "stayed", case)
    (stayed,) = map(seen_by_client, pool.finish("stayed"))

    def answered() -> Any:
        pool.settle()
        pool.forget_everything()
        return moved(pool, "r", case)

    assert answered() == stayed
    for group in kv.groups:

        def nothing(_block_ids: Sequence[int], _staging: torch.Tensor) -> None:
            """Nothing is written."""

        with monkeypatch.context() as patched:
            patched.setattr(group, "scatter", nothing)
            assert answered() != stayed, group.layout


def test_states_go_with_the_last_stage(pool: Pool) -> None:
    """However long the context is, a state is one block of its group."""
    port = pool.instances[0].port
    live = [index for index, group in enumerate(port.groups) if group.is_live]
    if not live:
        pytest.skip("a model without states")
    (sequence_id,) = ask(pool, "r", CASES["long prompt"])
    pool.until(lambda: pool.num_tokens("r") >= 3)
    port.start_export(sequence_id)
    ahead = port.pin_copyable(sequence_id).block_ids
    assert all(not ahead[index] for index in live)
    last = port.suspend(sequence_id).result().blocks.block_ids
    assert all(len(last[index]) == 1 for index in live)
    port.resume(sequence_id)
    pool.finish("r")
