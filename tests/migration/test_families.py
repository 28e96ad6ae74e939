"""Models whose KV cache has several groups, or states, move as exactly as those with one group.

Each family is a tiny model of two instances, which all its tests share. ``LLUMSCHED_THOROUGH=1``
takes every family and every kind of request.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

from llumsched.engine.transfer.access import LocalKV
from tests.campaigns import THOROUGH
from tests.families import CI_KINDS
from tests.migration.answers import seen_by_client
from tests.migration.cases import CASES
from tests.migration.leaving_out import moved
from tests.migration.pool import Pool
from tests.migration.test_soak import many_migrations
from tests.migration.test_waiting import preempt
from tests.migration.ways import ask, in_a_circle

# Moves of one long answer.
NUM_MOVES = 20 if THOROUGH else 6


@pytest.fixture
def unmoved(family_unmoved: dict[str, Any]) -> dict[str, Any]:
    return family_unmoved


@pytest.fixture
def pool(family_pool: Pool, unmoved: dict[str, Any]) -> Iterator[Pool]:
    """Two instances at rest; afterwards every block of every group must be free."""
    family_pool.recover()
    family_pool.forget_everything()
    yield family_pool
    family_pool.settle()


def test_alone_there_and_back(pool: Pool, unmoved: Mapping[str, Any]) -> None:
    for name in unmoved:
        answer = in_a_circle(pool, name, CASES[name])
        assert seen_by_client(answer) == unmoved[name], name


def test_in_a_batch_at_random(pool: Pool, unmoved: Mapping[str, Any]) -> None:
    chance = random.Random(20240610)
    names = [name for name in CI_KINDS if name != "three of one"]
    for index, name in enumerate(names):
        ask(pool, name, CASES[name], at=index % 2)
    num_moved = 0
    while not all(pool.answers[name].done for name in names):
        moves = [
            pool.start_move(s, 1 - pool.where(s))
            for s in _movable(pool, names)
            if chance.random() < 0.5
        ]
        num_moved += sum(report.outcome == "committed" for report in pool.until_moved(*moves))
        pool.step()
    assert num_moved >= len(names) // 2
    for name, answer in zip(names, pool.finish(*names), strict=True):
        assert seen_by_client(answer) == unmoved[name], name


def _movable(pool: Pool, names: Sequence[str]) -> list[str]:
    sequences = [s for name in names for s in pool.answers[name].sequence_ids]
    return [
        s
        for s in sequences
        if (route := pool.routes.get(s)) is not None
        and route.num_tokens > 0
        and pool.instances[pool.where(s)].migrator._incoming.may_leave(s)
    ]


def test_many_moves_of_one(pool: Pool, unmoved: Mapping[str, Any]) -> None:
    """The answer fills some blocks of every group, and leaves some of a window behind."""
    name = "long answer"
    (sequence_id,) = ask(pool, name, CASES[name])
    for number in range(NUM_MOVES):
        pool.until(lambda n=number: pool.num_tokens(name) >= 2 + 5 * n)  # type: ignore[misc]
        report = pool.move(sequence_id, 1 - pool.where(sequence_id))
        assert report.outcome == "committed", report
    (answer,) = pool.finish(name)
    assert seen_by_client(answer) == unmoved[name]


@pytest.mark.parametrize("when", ["before", "after"])
def test_preempted(pool: Pool, unmoved: Mapping[str, Any], when: str) -> None:
    """Before its move, or after it, the request loses its blocks and computes them again."""
    for name in ("long prompt", "penalties, seed"):
        (sequence_id,) = ask(pool, name, CASES[name])
        pool.until(lambda n=name: pool.num_tokens(n) >= 3)  # type: ignore[misc]
        if when == "before":
            preempt(pool, 0, sequence_id)
            pool.until(lambda n=name: pool.num_tokens(n) >= 6)  # type: ignore[misc]
        assert pool.move(sequence_id, 1).outcome == "committed"
        if when == "after":
            pool.until(lambda n=name: pool.num_tokens(n) >= 9)  # type: ignore[misc]
            preempt(pool, 1, sequence_id)
        (answer,) = pool.finish(name)
        assert seen_by_client(answer) == unmoved[name], name


def test_with_a_prefix_that_is_cached(pool: Pool, unmoved: Mapping[str, Any]) -> None:
    """The destination has the prompt in its cache, and caches what came for those who follow."""
    name = "long prompt"
    ask(pool, "earlier", CASES[name], at=1)
    pool.finish("earlier")
    (sequence_id,) = ask(pool, name, CASES[name])
    pool.until(lambda: pool.num_tokens(name) >= 3)
    report = pool.move(sequence_id, 1)
    assert report.outcome == "committed", report
    ask(pool, "beside", CASES[name], at=1)
    answers = pool.finish(name, "beside")
    ask(pool, "later", CASES[name], at=1)
    answers += pool.finish("later")
    assert [seen_by_client(answer) for answer in answers] == [unmoved[name]] * 3


def test_what_comes_is_cached_for_others(pool: Pool, unmoved: Mapping[str, Any]) -> None:
    name = "long prompt"
    (sequence_id,) = ask(pool, name, CASES[name])
    pool.until(lambda: pool.num_tokens(name) >= 3)
    assert pool.move(sequence_id, 1).outcome == "committed"
    pool.finish(name)
    ask(pool, "later", CASES[name], at=1)
    (later,) = pool.finish("later")
    assert seen_by_client(later) == unmoved[name]


def test_nothing_is_left_of_moves(pool: Pool, unmoved: Mapping[str, Any]) -> None:
    """``LLUMSCHED_MIGRATIONS=1000`` for a thousand."""
    many_migrations(pool, unmoved, int(os.environ.get("LLUMSCHED_MIGRATIONS", "12")))


def test_each_group_is_needed(
    pool: Pool, unmoved: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the blocks of any one group left out, an answer differs."""
    kv = pool.instances[1].port.kv
    assert isinstance(kv, LocalKV)
    name = "long prompt"
    assert moved(pool, name, CASES[name]) == unmoved[name]
    for group in kv.groups:
        pool.settle()
        pool.forget_everything()

        def nothing(_block_ids: Sequence[int], _staging: torch.Tensor) -> None:
            """Nothing is written."""

        with monkeypatch.context() as patched:
            patched.setattr(group, "scatter", nothing)
            assert moved(pool, name, CASES[name]) != unmoved[name], group.layout
