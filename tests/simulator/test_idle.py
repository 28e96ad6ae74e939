"""Idle time costs nothing and changes nothing, and long traces have no negative times."""

from __future__ import annotations

import dataclasses
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llumsched.config import Config
from llumsched.simulator.cluster.idle import IdleTime
from llumsched.simulator.cluster.loop import Cluster
from llumsched.simulator.cluster.results import check_times
from llumsched.simulator.options import SimulationError, SimulationOptions
from llumsched.simulator.simulation import simulate
from llumsched.simulator.traces.trace import Trace
from tests.campaigns import examples
from tests.simulator.clusters import REQUEST_COLUMNS, clusters, make_options, make_requests

DAY_S = 86_400.0


def with_gaps(trace: Trace, gaps_s: list[float]) -> Trace:
    """The trace in parts, with these gaps between them."""
    starts = np.linspace(0, len(trace), len(gaps_s) + 2, dtype=int)[1:-1]
    shift = np.zeros(len(trace))
    for start, gap_s in zip(starts, gaps_s, strict=True):
        shift[start:] += gap_s
    return dataclasses.replace(trace, arrival_s=trace.arrival_s + shift)


@pytest.mark.slow
@given(clusters(), st.lists(st.floats(30.0, 90.0), min_size=1, max_size=2))
@settings(max_examples=examples(15))
def test_what_is_cut_out_of_a_gap_changes_nothing(
    case: tuple[Trace, SimulationOptions], gaps_s: list[float]
) -> None:
    trace, options = with_gaps(case[0], gaps_s), dataclasses.replace(case[1], failures=())
    result = simulate(trace, options)
    with mock.patch.object(IdleTime, "length", return_value=0):
        whole = simulate(trace, options)
    for name in REQUEST_COLUMNS:
        # The scheduler adds its intervals up in floats: its decisions may be a rounding apart.
        np.testing.assert_allclose(
            getattr(result, name), getattr(whole, name), rtol=0, atol=1e-6, err_msg=name
        )
    assert result.makespan_s == pytest.approx(whole.makespan_s)
    assert len(result.migrations) == len(whole.migrations)


def test_a_gap_of_months_is_no_more_work_than_one_of_a_minute() -> None:
    def steps_of_the_scheduler(gap_s: float) -> int:
        options = make_options(num_instances=4, config=Config.default("latency"))
        trace = make_requests((0.0, 10, 10), (1.0, 10, 10), (1.0 + gap_s, 10, 10))
        cluster = Cluster(trace, options)
        handle = cluster._port.handle
        calls = 0

        def counted(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            return handle(*arguments)  # type: ignore[arg-type]

        with mock.patch.object(cluster._port, "handle", counted):
            cluster.run()
        return calls

    assert steps_of_the_scheduler(300 * DAY_S) <= steps_of_the_scheduler(60.0) + 100


def test_a_trace_of_years_has_its_times() -> None:
    """Picoseconds of 106 days no longer fit into 64 bits."""
    trace = make_requests((0.0, 10, 10), (121 * DAY_S, 10, 10), (20_000 * DAY_S, 10, 10))
    result = simulate(trace, make_options(record_timeline=True))
    ttft_s = result.first_token_s - trace.arrival_s
    assert ttft_s == pytest.approx([ttft_s[0]] * 3, abs=1e-6)
    assert ttft_s[0] > 0
    assert result.end_s >= 20_000 * DAY_S
    assert result.timeline is not None
    assert result.timeline.time_s.max() <= result.end_s


def test_a_simulation_that_ends_in_a_gap_ends_there() -> None:
    trace = make_requests((0.0, 10, 10), (DAY_S, 10, 10))
    result = simulate(trace, make_options(until_s=DAY_S / 2))
    assert result.end_s == pytest.approx(DAY_S / 2)
    assert not result.is_complete


def test_a_time_that_cannot_be_is_refused_before_it_is_shown() -> None:
    trace = make_requests((5.0, 10, 10))
    result = simulate(trace, make_options())
    wrong = dataclasses.replace(result, first_token_s=np.array([4.0]))
    with pytest.raises(SimulationError, match=r"first_token_s of request 0 is 4\.000000 s, before"):
        check_times(wrong, [5 * 10**12])
