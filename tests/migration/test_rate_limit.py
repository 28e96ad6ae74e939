"""A limit on bytes a second."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumsched.migration.rate_limit import RateLimiter


def test_no_limit() -> None:
    pacer = RateLimiter(0)
    assert [pacer.delay_s(10**9, now_s=1.0) for _ in range(3)] == [0, 0, 0]


def test_what_comes_next_waits_for_what_was_sent() -> None:
    pacer = RateLimiter(100)
    assert pacer.delay_s(50, now_s=10.0) == 0
    assert pacer.delay_s(50, now_s=10.0) == pytest.approx(0.5)
    assert pacer.delay_s(50, now_s=10.25) == pytest.approx(0.75)
    # Time that was not used is not saved up.
    assert pacer.delay_s(50, now_s=60.0) == 0


def test_copying_rests_for_as_long_as_its_share_of_a_core_demands() -> None:
    pacer = RateLimiter(0, core_share=0.1)
    assert pacer.delay_s(50, now_s=10.0) == 0
    pacer.copied(0.01, now_s=10.01)
    assert pacer.delay_s(50, now_s=10.01) == pytest.approx(0.09)
    # A last stage did not wait: what comes after it waits for both.
    pacer.copied(0.01, now_s=10.02)
    assert pacer.delay_s(50, now_s=10.05) == pytest.approx(0.14)
    assert pacer.delay_s(50, now_s=11.0) == 0


def test_both_limits_are_kept() -> None:
    pacer = RateLimiter(100, core_share=0.5)
    assert pacer.delay_s(50, now_s=10.0) == 0
    pacer.copied(0.2, now_s=10.2)
    assert pacer.delay_s(50, now_s=10.2) == pytest.approx(0.3)
    pacer.copied(0.9, now_s=10.5)
    assert pacer.delay_s(50, now_s=10.5) == pytest.approx(0.9)


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 2)), max_size=30))
def test_never_more_than_the_limit(parts: list[tuple[int, float]]) -> None:
    pacer, now_s, sent = RateLimiter(100), 0.0, []
    for num_bytes, pause_s in parts:
        now_s += pause_s
        sent.append((now_s + pacer.delay_s(num_bytes, now_s), num_bytes))
    for (start_s, num_bytes), (next_s, _) in itertools.pairwise(sent):
        assert next_s >= start_s + num_bytes / 100 - 1e-6
