"""The figures of a result made by hand, each computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llumsched.simulator.results.metrics import Distribution, Slo, latencies, reasons, summarise
from llumsched.simulator.results.records import RequestStatus, Timeline
from llumsched.simulator.traces.trace import make_trace
from tests.simulator.results import NAN, make_result


def test_latencies_are_from_arrival_and_of_finished_requests_only() -> None:
    times = latencies(make_result())
    assert times.ttft_s.tolist() == pytest.approx([1.0, 0.5, NAN, NAN], nan_ok=True)
    assert times.e2e_s.tolist() == pytest.approx([3.0, 0.5, NAN, NAN], nan_ok=True)
    assert times.queueing_s.tolist() == pytest.approx([0.5, 0.0, NAN, NAN], nan_ok=True)
    # Ten gaps in two seconds; an answer of one token has no gap.
    assert times.tpot_s.tolist() == pytest.approx([0.2, NAN, NAN, NAN], nan_ok=True)
    assert times.itl_max_s.tolist() == pytest.approx([0.6, NAN, NAN, NAN], nan_ok=True)


def test_the_summary_of_four_requests() -> None:
    summary = summarise(make_result())
    assert summary.num_requests == 4
    assert (summary.num_finished, summary.num_rejected) == (2, 1)
    assert (summary.num_lost, summary.num_unfinished) == (0, 1)
    assert summary.request_throughput_rps == pytest.approx(2 / 5)
    assert summary.output_throughput_tps == pytest.approx(12 / 5)
    assert summary.total_throughput_tps == pytest.approx(312 / 5)
    assert summary.ttft_s.mean == pytest.approx(0.75)
    # One step of 0.1, one of 0.2, and one of 0.6 that gave two requests a token.
    assert summary.itl_s.count == 4
    assert summary.itl_s.mean == pytest.approx(0.375)
    assert summary.itl_s.p50 == pytest.approx(0.4)
    assert summary.itl_s.p99 == pytest.approx(np.percentile([0.1, 0.2, 0.6, 0.6], 99))
    assert summary.num_preemptions == 3
    assert summary.preemption_loss_s.mean == pytest.approx(0.2)
    assert summary.itl_max_s.max == pytest.approx(0.6)
    assert summary.num_migrations == 1
    assert summary.migration_downtime_s.p99 == pytest.approx(0.02)


def test_the_prefix_hit_rate_is_over_the_prompts_that_were_scheduled() -> None:
    assert math.isnan(summarise(make_result()).prefix_hit_rate)
    trace = make_trace(
        "hashes",
        arrival_s=[0.0, 1.0, 2.0, 3.0],
        num_prompt_tokens=[100, 200, 300, 400],
        num_output_tokens=[11, 1, 5, 100],
        prefix_hashes=[[1], [1], [1], [1]],
    )
    # The third was rejected, so nobody looked for its prefix.
    assert summarise(make_result(trace=trace)).prefix_hit_rate == pytest.approx(320 / 700)


def test_instances_are_paid_for_from_launch_to_end() -> None:
    summary = summarise(make_result())
    assert summary.instance_seconds == pytest.approx(5.0 + 3.0)
    assert summary.mean_instances == pytest.approx(8.0 / 5.0)


def test_a_token_costs_the_hours_of_all_instances() -> None:
    result = make_result()
    is_finished = result.status == RequestStatus.FINISHED
    num_tokens = int(result.num_output_tokens[is_finished].sum())
    summary = summarise(result, hour_price=3.0)
    assert summary.instance_hours_per_mtoken == pytest.approx(8.0 / 3600 / num_tokens * 1e6)
    assert summary.cost_per_mtoken == pytest.approx(3.0 * summary.instance_hours_per_mtoken)
    assert math.isnan(summarise(result).cost_per_mtoken)


def test_fragmentation_is_what_is_free_while_a_request_waits() -> None:
    # Nobody waits in the second before the last arrival but one; then 40 of 200 blocks are free.
    summary = summarise(make_result())
    assert summary.fragmentation == pytest.approx((0.0 + 0.2) / 2)
    assert summary.kv_usage == pytest.approx((150 / 200 + 160 / 200) / 2)
    nothing = summarise(make_result(timeline=None))
    assert math.isnan(nothing.fragmentation)
    assert math.isnan(nothing.kv_usage)


def test_an_instance_that_reports_at_another_moment_counts_as_it_was() -> None:
    """Reports are spread over the interval: one sample is of one instance."""
    timeline = Timeline(
        time_s=np.array([0.0, 0.5, 1.0, 1.5]),
        instance=np.array([0, 1, 0, 1]),
        num_used_blocks=np.array([100, 0, 100, 0]),
        num_reserved_blocks=np.zeros(4, dtype=np.int64),
        num_free_blocks=np.array([0, 100, 0, 100]),
        num_running=np.array([1, 0, 1, 0]),
        num_waiting=np.array([3, 0, 3, 0]),
    )
    # From 0.5 on one instance is full with a queue, and the other empty.
    summary = summarise(make_result(timeline=timeline))
    assert summary.fragmentation == pytest.approx(0.5 * 2.5 / 3)


def test_reasons_that_differ_in_a_number_are_one() -> None:
    assert reasons(["full (3 wait)", "full (41 wait)", "too long"]) == {
        "full (N wait)": 2,
        "too long": 1,
    }
    assert reasons(["full (3 wait)"] * 2) == {"full (3 wait)": 2}


@pytest.mark.parametrize(
    ("slo", "num_kept"),
    [
        (Slo(ttft_s=1.0), 2),
        (Slo(ttft_s=0.9), 1),
        (Slo(tpot_s=0.1), 1),
        (Slo(ttft_s=1.0, tpot_s=0.2, e2e_s=2.0), 1),
        (Slo(e2e_s=0.1), 0),
    ],
)
def test_goodput_counts_what_keeps_every_bound(slo: Slo, num_kept: int) -> None:
    summary = summarise(make_result(), slo)
    # One request a second arrives; the two seconds after the last arrival do not count.
    assert summary.goodput_rps == pytest.approx(num_kept / 4)
    assert summary.slo_attainment == pytest.approx(num_kept / 4)


def test_a_run_that_was_cut_short_is_not_blamed_for_what_had_not_arrived() -> None:
    summary = summarise(make_result(end_s=1.5), Slo(ttft_s=1.0))
    assert (summary.slo_attainment, summary.goodput_rps) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("slo", [None, Slo()])
def test_there_is_no_goodput_without_an_slo(slo: Slo | None) -> None:
    assert math.isnan(summarise(make_result(), slo).goodput_rps)


def test_percentiles_are_interpolated() -> None:
    values = Distribution.of(np.array([4.0, NAN, 1.0, 2.0, 3.0]))
    assert (values.count, values.mean, values.p50) == (4, 2.5, 2.5)
    assert values.p99 == pytest.approx(3.97)
    assert values.max == 4.0
    assert math.isnan(Distribution.of(np.array([NAN])).p99)
