"""The closed form of both engines against a model that walks every token of every request."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llumsched.simulator.cluster.loop import Cluster
from llumsched.simulator.engines.batch import DecodeBatch
from llumsched.simulator.engines.cost import StepCost
from llumsched.simulator.engines.machine import Costs
from llumsched.simulator.engines.request import DECODING, LiveRequest
from llumsched.simulator.engines.vllm_v1 import EngineV1
from llumsched.simulator.kernel import PS_PER_S, Kernel, to_ps
from llumsched.simulator.simulation import simulate
from llumsched.simulator.traces.trace import Trace, make_trace
from tests.campaigns import examples
from tests.simulator.clusters import (
    engine_options,
    make_hardware,
    make_options,
    make_requests,
    traces,
)
from tests.simulator.naive_engine import Naive, NaiveV01, NaiveV1

# Random requests may be longer than what a small engine holds.
pytestmark = pytest.mark.filterwarnings("ignore:.*cut short")

BLOCK_SIZE = 4


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=examples(150))
def test_every_time_is_that_of_a_walk_over_all_tokens(data: st.DataObject) -> None:
    given_options = data.draw(engine_options(block_size=BLOCK_SIZE))
    trace = data.draw(traces(block_size=BLOCK_SIZE, with_hashes=False))
    options = make_options(**given_options)
    kind = NaiveV1 if options.engine == "vllm-v1" else NaiveV01
    naive = kind(
        cost=StepCost(options.hardware.step, options.effective_batched_tokens),
        num_blocks=options.effective_kv_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=options.max_num_seqs,
        max_batched_tokens=options.effective_batched_tokens,
        watermark_blocks=int(options.effective_watermark * options.effective_kv_blocks),
    )
    longest = (naive.num_blocks - naive.watermark_blocks) * BLOCK_SIZE
    requests = [
        Naive(arrival=to_ps(arrival), num_prompt=prompt, num_output=min(output, longest - prompt))
        for arrival, prompt, output in zip(
            trace.arrival_s.tolist(),
            trace.num_prompt_tokens.tolist(),
            trace.num_output_tokens.tolist(),
            strict=True,
        )
    ]

    naive.run(requests)
    result = simulate(trace, options)

    def seconds(times: list[int]) -> list[float]:
        return [time / PS_PER_S for time in times]

    assert result.scheduled_s.tolist() == seconds([r.scheduled for r in requests])
    assert result.first_token_s.tolist() == seconds([r.token_times[0] for r in requests])
    assert result.finished_s.tolist() == seconds([r.token_times[-1] for r in requests])
    assert result.num_preemptions.tolist() == [r.num_preemptions for r in requests]
    assert result.num_steps == naive.num_steps
    gaps = [r.longest_gap / PS_PER_S if len(r.token_times) > 1 else np.nan for r in requests]
    np.testing.assert_array_equal(result.itl_max_s, gaps)
    every_gap = [gap for r in requests for gap in seconds(r.gaps)]
    found = np.repeat(*result.token_gaps.weighted())
    np.testing.assert_allclose(np.sort(found), np.sort(every_gap), rtol=1e-9)


def run(trace: Trace, **changes: Any) -> list[list[float]]:
    """First token and end of each request, in milliseconds."""
    result = simulate(trace, make_options(**changes))
    columns = zip(result.first_token_s.tolist(), result.finished_s.tolist(), strict=True)
    return [[round(time * 1e3, 3) for time in times] for times in columns]


class TestV1:
    def test_one_request_takes_a_prefill_and_a_step_for_each_further_token(self) -> None:
        # 36.04 ms is the floor; one decode adds 0.27 ms and 0.874 us for each token of context.
        prefill = 36.04 + 10.2e-6 * 10 * 10 / 2
        decode_1, decode_2 = (36.31 + 0.874e-3 * tokens for tokens in (10, 11))
        [[first, last]] = run(make_requests((1.0, 10, 3)))
        assert first == pytest.approx(1000 + prefill, abs=1e-3)
        assert last == pytest.approx(1000 + prefill + decode_1 + decode_2, abs=2e-3)

    def test_a_long_prompt_is_computed_in_chunks_beside_the_decodes(self) -> None:
        trace = make_requests((0.0, 4, 50), (0.1, 200, 2))
        result = simulate(trace, make_options(max_num_seqs=8, max_num_batched_tokens=64))
        # 63 tokens a step are left beside the decode: four steps, and the decode never waits.
        assert result.itl_max_s[0] < 0.05
        assert 4 * 0.036 < result.first_token_s[1] - result.scheduled_s[1] < 4 * 0.04

    def test_the_last_admitted_is_evicted_and_recomputes_all_it_had(self) -> None:
        trace = make_requests((0.0, 40, 100), (0.0, 40, 100))
        hardware = make_hardware(num_blocks=40)
        result = simulate(trace, make_options(hardware=hardware))
        assert result.num_preemptions.tolist() == [0, 1]
        assert result.preemption_loss_s[0] == 0
        # It waits until the other ends.
        assert result.itl_max_s[1] > result.preemption_loss_s[1] > 1.0
        assert result.finished_s[1] > result.finished_s[0]

    def test_no_request_is_admitted_below_the_watermark_of_a_busy_engine(self) -> None:
        trace = make_requests((0.0, 300, 40), (0.5, 300, 2))
        hardware = make_hardware(num_blocks=160)
        at_once = simulate(trace, make_options(hardware=hardware))
        held = simulate(trace, make_options(hardware=hardware, watermark=0.05))
        assert at_once.scheduled_s[1] < at_once.finished_s[0]
        assert held.scheduled_s[1] == held.finished_s[0]

    def test_what_the_prefix_cache_held_is_counted_once(self) -> None:
        """When a request is first scheduled: what is found again after an eviction saves nothing
        of its prompt that was not paid for already."""
        trace = make_trace(
            "shared",
            arrival_s=[0.0, 1.0, 1.5],
            num_prompt_tokens=[40, 42, 41],
            num_output_tokens=[2, 100, 100],
            prefix_hashes=[list(range(10))] * 3,
            hash_block_size=BLOCK_SIZE,
        )
        result = simulate(trace, make_options(hardware=make_hardware(num_blocks=50)))
        assert result.num_preemptions.sum() >= 1
        assert result.num_cached_tokens.tolist() == [0, 40, 40]

    def test_no_more_than_max_num_seqs_run(self) -> None:
        trace = make_requests(*[(0.0, 4, 10)] * 3)
        result = simulate(trace, make_options(max_num_seqs=2))
        assert result.scheduled_s.tolist() == [0, 0, result.finished_s[0]]

    def test_an_arrival_decodes_from_the_next_step_on_whatever_prompt_is_under_way(self) -> None:
        kernel, cost = Kernel(), StepCost(make_hardware().step, 64)
        engine = EngineV1(
            index=0,
            instance_id="destination",
            host=mock.Mock(),
            kernel=kernel,
            costs=Costs(cost, cost),
            costs_copying=Costs(cost, cost),
            num_blocks=200,
            block_size=BLOCK_SIZE,
            max_num_seqs=8,
            max_batched_tokens=64,
            watermark_blocks=0,
            cache=None,
            step_by_step=False,
        )
        prompt = LiveRequest(0, "prompt", 400, 2, 0, 0, ())
        engine.add(prompt, 0)
        arrivals = [LiveRequest(row, f"moved-{row}", 40, 30, 0, 0, ()) for row in (1, 2)]

        def end_step() -> None:
            time, _, _, _ = kernel.pop()
            engine.end_of_segment(time)

        while prompt.computed < 128:
            end_step()
        for arrival in arrivals:
            arrival.computed, arrival.generated, arrival.num_blocks = 44, 5, 11
            engine.num_used += arrival.num_blocks
            engine.resume(arrival, engine.segment_start)
        end_step()
        assert [arrival.phase for arrival in arrivals] == [DECODING, DECODING]
        # Each takes one token of the budget, and the prompt what is left.
        assert engine.prefills == [(prompt, 62)]
        # The prompt came before them, and is evicted before them.
        assert next(reversed(engine.running)) is prompt
        end_step()
        assert engine.progress == 1


class TestV01:
    def test_a_prompt_stalls_every_decode(self) -> None:
        trace = make_requests((0.0, 4, 50), (0.1, 700, 2))
        result = simulate(trace, make_options(engine="vllm-0.1"))
        prefill = 5.6e-3 + 0.203e-3 * 700 + 5.1e-9 * 700**2
        assert result.first_token_s[1] - result.scheduled_s[1] == pytest.approx(prefill)
        assert result.itl_max_s[0] > prefill + 0.036

    def test_what_does_not_fit_holds_back_what_would(self) -> None:
        trace = make_requests((0.0, 500, 30), (0.1, 500, 2), (0.2, 4, 2))
        result = simulate(trace, make_options(engine="vllm-0.1"))
        assert result.scheduled_s[1] == result.scheduled_s[2] == result.finished_s[0]

    def test_who_came_last_is_evicted(self) -> None:
        trace = make_requests((0.0, 40, 100), (0.1, 40, 100))
        hardware = make_hardware(num_blocks=42)
        result = simulate(trace, make_options(engine="vllm-0.1", hardware=hardware))
        assert result.num_preemptions[0] == 0
        assert result.num_preemptions[1] >= 1


def test_a_request_taken_back_from_the_queue_leaves_nothing_in_its_sums() -> None:
    trace = make_requests((0.0, 4, 50), (0.0, 30, 5), (0.0, 40, 5))
    cluster = Cluster(trace, make_options(max_num_seqs=1, until_s=0.5))
    cluster.run()
    (engine, *_) = cluster.engines
    assert len(engine.waiting) == 2
    for request in list(engine.waiting):
        engine.take_back(request, engine.kernel.now)
    sums = (engine.num_waiting_tokens, engine.num_waiting_pairs, engine.num_waiting_blocks)
    assert sums == (0, 0, 0)


def test_a_dead_engine_begins_no_step_whoever_still_writes_to_it() -> None:
    """The end of a copy, or blocks that come free, may come after the instance died."""
    trace = make_requests((0.0, 4, 50))
    cluster = Cluster(trace, make_options(failures=((0, 0.01),), until_s=0.5))
    cluster.run()
    (engine, *_) = cluster.engines
    num_steps = engine.num_steps
    assert not engine.is_alive
    assert engine.running
    engine.cut(engine.kernel.now)
    engine.freed(engine.kernel.now)
    assert engine.due < 0
    assert engine.num_steps == num_steps


def test_one_that_was_evicted_before_its_first_step_and_came_again_has_one_gap() -> None:
    batch = DecodeBatch(Kernel(), BLOCK_SIZE, has_skew=False)
    request = LiveRequest(0, "r0", 8, 4, 0, 0, ())
    request.computed, request.generated, request.last_token = 8, 1, 5
    request.place = batch
    batch.join(request)
    batch.joiners += [request, request]
    batch.greet(12)
    assert batch.own_gaps == [7]


def test_one_that_moved_away_before_its_first_step_has_no_gap_where_it_was() -> None:
    # It decodes elsewhere, at the step at which it would have begun here.
    here, there = (DecodeBatch(Kernel(), BLOCK_SIZE, has_skew=False) for _ in range(2))
    request = LiveRequest(0, "r0", 8, 4, 0, 0, ())
    request.computed, request.generated, request.last_token = 8, 1, 5
    request.place = there
    there.join(request)
    here.joiners.append(request)
    here.greet(12)
    assert not here.own_gaps
    assert not request.itl_max
