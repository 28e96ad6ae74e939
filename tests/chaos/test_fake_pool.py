"""Instances that die in a pool of fake engines, at any moment that bytes can spell.

`LLUMSCHED_CHAOS_RUNS=20000 pytest -s tests/chaos/test_fake_pool.py` runs more pools than the
default.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llumsched.frontend.routing.routes import Route, Routes
from tests.campaigns import examples
from tests.chaos.fake_pool import FakePool

NUM_RUNS = int(os.environ.get("LLUMSCHED_CHAOS_RUNS", "300"))


def acts_of(seed: int) -> bytes:
    generator = random.Random(seed)
    return generator.randbytes(2 * generator.randrange(60, 480))


def run(seed: int) -> FakePool:
    try:
        pool = FakePool(seed)
        pool.run(acts_of(seed))
    except Exception as error:
        error.add_note(f"FakePool({seed}).run(acts_of({seed}))")
        raise
    return pool


def test_streams_survive_the_death_of_instances() -> None:
    num_deaths = num_resumptions = num_tokens = 0
    for seed in range(NUM_RUNS):
        pool = run(seed)
        num_deaths += sum(not instance.alive for instance in pool.instances.values())
        num_resumptions += len(pool.resumed)
        num_tokens += sum(len(client.tokens) for client in pool.clients.values())
    sys.stdout.write(
        f"\n{NUM_RUNS} runs, {num_deaths} deaths of instances, {num_resumptions} resumptions, "
        f"{num_tokens} tokens compared\n"
    )
    assert num_resumptions > NUM_RUNS / 2, "or else this shows nothing"


@settings(max_examples=examples(50))
@given(seed=st.integers(0, 2**32), acts=st.binary(max_size=400))
def test_hypothesis_finds_no_lost_token(seed: int, acts: bytes) -> None:
    FakePool(seed).run(acts)


# The pools notice what is wrong.


def number_a_resumption_as_a_move(patch: pytest.MonkeyPatch) -> None:
    begin_again = Routes.begin_again

    def count_on(routes: Routes, route: Route) -> None:
        placement_number = route.placement_number
        begin_again(routes, route)
        route.placement_number = placement_number + 1

    patch.setattr(Routes, "begin_again", count_on)


def look_for_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FakePool, "_audit", lambda _: False)


@pytest.mark.parametrize(
    ("mistake", "seed", "noticed"),
    [
        (number_a_resumption_as_a_move, 10624, "expected"),
        (look_for_nothing, 3304, "stopped after"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_mistake_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
    mistake: Callable[[pytest.MonkeyPatch], None],
    seed: int,
    noticed: str,
) -> None:
    run(seed)
    mistake(monkeypatch)
    with pytest.raises(AssertionError, match=noticed):
        run(seed)
