"""A trace keeps its rows together, whatever is done to it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumsched.simulator.traces.trace import Trace, TraceError, make_trace


def make(**changed: object) -> Trace:
    columns: dict[str, object] = {
        "arrival_s": [3.0, 1.0, 2.0],
        "num_prompt_tokens": [48, 16, 32],
        "num_output_tokens": [3, 1, 2],
        "client_ids": ["c", "a", "b"],
        "prefix_hashes": [(7, 8, 9), (7,), (7, 8)],
    }
    return make_trace("three", **(columns | changed))  # type: ignore[arg-type]


def test_rows_are_sorted_by_arrival_together() -> None:
    trace = make()
    assert trace.arrival_s.tolist() == [1.0, 2.0, 3.0]
    assert trace.num_prompt_tokens.tolist() == [16, 32, 48]
    assert trace.num_output_tokens.tolist() == [1, 2, 3]
    assert trace.client_ids == ("a", "b", "c")
    assert trace.prefix_hashes == ((7,), (7, 8), (7, 8, 9))
    assert trace.scheduling_priority.tolist() == [0, 0, 0]
    assert (trace.span_s, trace.rate_rps) == (2.0, 1.0)


def test_the_head_is_the_first_to_arrive() -> None:
    head = make().head(2)
    assert (len(head), head.client_ids) == (2, ("a", "b"))
    assert head.prefix_hashes == ((7,), (7, 8))


def test_scaling_says_so() -> None:
    trace = make().scaled(rate=2.0, length=0.5)
    assert trace.arrival_s.tolist() == [0.5, 1.0, 1.5]
    assert trace.num_prompt_tokens.tolist() == [8, 16, 24]
    assert trace.num_output_tokens.tolist() == [1, 1, 2]
    assert trace.hash_block_size == 8
    assert trace.prefix_hashes == ((7,), (7, 8), (7, 8, 9))
    assert trace.notes == (
        "arrivals 2 times as dense as in the trace",
        "lengths 0.5 times those of the trace",
    )


@given(st.floats(0.05, 20.0))
def test_a_scaled_prompt_still_holds_its_hashed_blocks(length: float) -> None:
    trace = make().scaled(length=length)
    assert trace.prefix_hashes is not None
    for hashes, num_tokens in zip(trace.prefix_hashes, trace.num_prompt_tokens, strict=True):
        assert len(hashes) * trace.hash_block_size <= num_tokens


def test_priorities_are_drawn_in_the_share_asked_for() -> None:
    trace = make_trace(
        "many",
        arrival_s=np.arange(4000),
        num_prompt_tokens=[1] * 4000,
        num_output_tokens=[1] * 4000,
    ).with_priorities(0.1, seed=5)
    assert trace.scheduling_priority.mean() == pytest.approx(0.1, abs=0.02)
    assert np.array_equal(trace.scheduling_priority, trace.execution_priority)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_output_tokens": [1, 2]}, "num_output_tokens has 2 rows, arrival_s has 3"),
        ({"client_ids": ["a"]}, "client_ids has 1 rows"),
        ({"num_prompt_tokens": [1, 0, 1], "prefix_hashes": None}, "must be at least 1, not 0"),
        ({"arrival_s": [0.0, float("nan"), 1.0]}, "an arrival time is not a number"),
        ({"prefix_hashes": [(1, 2, 3, 4), (), ()]}, "4 prefix hashes of 16 tokens for a prompt of"),
    ],
)
def test_columns_that_do_not_fit_are_refused(changed: dict[str, object], said: str) -> None:
    with pytest.raises(TraceError, match=said):
        make(**changed)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_a_factor_must_be_positive(factor: float) -> None:
    with pytest.raises(TraceError, match="must be above 0"):
        make().scaled(rate=factor)


def test_resampled_gaps_are_those_of_the_trace_and_keep_its_rate() -> None:
    rng = np.random.default_rng(1)
    trace = make_trace(
        "t",
        arrival_s=np.cumsum(rng.exponential(1.0, 500)),
        num_prompt_tokens=np.arange(1, 501),
        num_output_tokens=[1] * 500,
    )
    one, other = trace.resampled(1), trace.resampled(2)
    assert trace.resampled(1).is_same(one)
    assert not one.is_same(other)
    assert not one.is_same(trace)
    for made in (one, other):
        assert made.num_prompt_tokens.tolist() == trace.num_prompt_tokens.tolist()
        assert made.rate_rps == pytest.approx(trace.rate_rps)
        gaps = np.diff(made.arrival_s)
        # All are stretched alike, so that neighbours of a block are neighbours of the trace.
        ratios = gaps[1:10] / gaps[:9]
        known = np.diff(trace.arrival_s)
        assert any(np.allclose(known[i + 1 : i + 10] / known[i : i + 9], ratios)
                   for i in range(489))  # fmt: skip
