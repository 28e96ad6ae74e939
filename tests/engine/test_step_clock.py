"""The guess of when a step ends goes by steps of as many tokens."""

from __future__ import annotations

import pytest

from llumsched.engine.base import StepAhead
from llumsched.engine.vllm.step_clock import StepClock


def take_step(clock: StepClock, at_s: float, num_tokens: int, seconds: float) -> float:
    """A step from ``at_s`` on, with another to follow; when it ends."""
    clock.begin(at_s)
    clock.note_batch(num_tokens)
    clock.end(at_s + seconds, was_computed=True, has_more=True)
    return at_s + seconds


def test_nothing_is_known_of_an_engine_that_has_not_computed() -> None:
    clock = StepClock()
    assert clock.ahead(1.0) == StepAhead()
    clock.begin(1.0)
    clock.note_batch(100)
    assert clock.ahead(1.5) == StepAhead()


def test_the_end_of_the_step_under_way() -> None:
    clock = StepClock()
    now_s = take_step(clock, 0.0, 2048, 2.0)
    now_s = take_step(clock, now_s, 3, 0.03)
    clock.begin(now_s)
    clock.note_batch(2048)
    ahead = clock.ahead(now_s + 0.5)
    assert ahead.step_s == pytest.approx(2.0)
    assert ahead.ends_in_s == pytest.approx(1.5)
    assert clock.ahead(now_s + 5.0).ends_in_s == 0.0
    clock.end(now_s + 5.0, was_computed=True, has_more=True)
    # Between two steps: the next is about to begin.
    assert clock.ahead(now_s + 5.0).ends_in_s == 0.0
    assert clock.ahead(now_s + 5.0).step_s == pytest.approx(3.5)


def test_a_step_of_a_size_that_was_not_seen_goes_by_the_nearest() -> None:
    clock = StepClock()
    now_s = take_step(clock, 0.0, 500, 0.5)
    now_s = take_step(clock, now_s, 2, 0.02)
    clock.begin(now_s)
    clock.note_batch(2000)
    assert clock.ahead(now_s).step_s == pytest.approx(2.0)


def test_an_idle_engine_has_no_step_to_wait_for() -> None:
    clock = StepClock()
    clock.begin(0.0)
    clock.note_batch(2048)
    clock.end(2.0, was_computed=True, has_more=False)
    assert clock.ahead(2.1) == StepAhead()
