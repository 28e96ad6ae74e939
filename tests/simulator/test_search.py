"""Sizing finds the edge, wherever it begins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumsched.simulator.search import Found, highest_rate, least_instances


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 4000))
def test_the_fewest_instances_are_found(needed: int, start: int, most: int) -> None:
    tried: list[int] = []

    def keeps(num_instances: int) -> bool:
        tried.append(num_instances)
        return num_instances >= needed

    found = least_instances(keeps, start, most)
    if found.best is None:
        assert needed > most
        assert found.next_worse == max(start, most)
    else:
        assert found == Found(best=needed, next_worse=needed - 1 or None)
    assert len(tried) == len(set(tried)) < 30


@given(st.floats(0.01, 1000), st.floats(0.1, 100))
def test_the_highest_rate_is_found_to_two_percent(limit: float, start: float) -> None:
    found = highest_rate(lambda rate: rate <= limit, start)
    assert found.best is not None
    assert found.next_worse is not None
    assert found.best <= limit < found.next_worse
    assert found.best == pytest.approx(found.next_worse, rel=0.021)


def test_an_objective_that_nothing_keeps_has_no_answer() -> None:
    assert least_instances(lambda _: False, 4, 100).best is None
    assert highest_rate(lambda _: False, 4.0).best is None
    assert highest_rate(lambda _: True, 4.0).next_worse is None
