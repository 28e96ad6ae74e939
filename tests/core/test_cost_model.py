"""Step times and lengths of answers, learned from load reports alone."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llumsched.core.scheduling.cost_model import CostModel, StepTimeLearner
from llumsched.core.step_time import DEFAULT_STEP_TIME, MeasuredStep, StepTimeModel
from tests.campaigns import examples
from tests.core.builders import make_load, make_spec

H100 = StepTimeModel(
    base_s=0.007,
    prefill_token_s=2e-5,
    prefill_pair_s=9e-10,
    running_s=5e-6,
    kv_token_s=4e-8,
)


def step_of(model: StepTimeModel, rng: random.Random, noise: float = 0.0) -> MeasuredStep:
    num_prefill_tokens = rng.choice((0, 0, 200, 1500, 2000))
    num_pairs = num_prefill_tokens * rng.randrange(1, 60_000)
    num_decodes = rng.randrange(1, 100)
    num_kv_tokens = num_decodes * rng.randrange(100, 4000)
    seconds = (
        model.base_s
        + model.prefill_token_s * num_prefill_tokens
        + model.prefill_pair_s * num_pairs
        + model.running_s * num_decodes
        + model.kv_token_s * num_kv_tokens
    )
    return MeasuredStep(
        num_prefill_tokens=num_prefill_tokens,
        num_pairs=num_pairs,
        num_decodes=num_decodes,
        num_kv_tokens=num_kv_tokens,
        num_skew_tokens=0,
        seconds=seconds * (1 + rng.uniform(-noise, noise)),
    )


def test_the_hardware_is_known_after_some_reports_whatever_was_configured() -> None:
    learner, rng = StepTimeLearner(DEFAULT_STEP_TIME), random.Random(1)
    for number in range(400):
        learner.observe(step_of(H100, rng, noise=0.05), float(number))
    found = learner.model
    assert found.base_s == pytest.approx(H100.base_s, rel=0.1)
    assert found.prefill_token_s == pytest.approx(H100.prefill_token_s, rel=0.1)
    assert found.prefill_pair_s == pytest.approx(H100.prefill_pair_s, rel=0.1)
    assert found.kv_token_s == pytest.approx(H100.kv_token_s, rel=0.1)


def test_hardware_that_changes_is_learned_again() -> None:
    learner, rng = StepTimeLearner(DEFAULT_STEP_TIME), random.Random(2)
    for number in range(1000):
        learner.observe(step_of(H100, rng), float(number))
    slower = StepTimeModel(base_s=0.014, prefill_token_s=4e-5, running_s=1e-5, kv_token_s=8e-8)
    for number in range(1000, 4000):
        learner.observe(step_of(slower, rng), float(number))
    assert learner.model.base_s == pytest.approx(0.014, rel=0.1)
    assert learner.model.prefill_token_s == pytest.approx(4e-5, rel=0.1)


@given(seed=st.integers(0, 2**32 - 1), odd=st.floats(0, 10))
@settings(max_examples=examples(30))
def test_no_step_makes_a_coefficient_negative(seed: int, odd: float) -> None:
    learner, rng = StepTimeLearner(DEFAULT_STEP_TIME), random.Random(seed)
    for number in range(50):
        step = step_of(H100, rng, noise=0.9)
        learner.observe(step, float(number))
        learner.observe(
            MeasuredStep(
                num_prefill_tokens=step.num_prefill_tokens,
                num_pairs=0,
                num_decodes=0,
                num_kv_tokens=0,
                num_skew_tokens=0,
                seconds=odd,
            ),
            number + 0.5,
        )
        model = learner.model
        assert min(model.base_s, model.prefill_token_s, model.prefill_pair_s) >= 0
        assert min(model.running_s, model.kv_token_s) >= 0


def test_reports_closer_than_need_be_are_passed_over_once_much_is_known() -> None:
    learner, rng = StepTimeLearner(DEFAULT_STEP_TIME), random.Random(3)
    taken = [learner.observe(step_of(H100, rng), 0.001 * number) for number in range(2000)]
    assert all(taken[:200])
    assert sum(taken[200:]) < 50


def test_answers_under_way_count_before_any_has_ended() -> None:
    costs, spec = CostModel(DEFAULT_STEP_TIME), make_spec()
    busy = make_load(num_used_blocks=50, num_running=10, step_time_s=0.02)
    for second in range(1, 61):
        costs.reported(spec, busy, 1.0, busy, float(second))
    # Ten requests have decoded 3,000 tokens each, and none is done.
    assert costs.latest.mean_output_tokens > 10_000
    for _ in range(50):
        costs.ended()
    costs.reported(spec, busy, 0.1, busy, 61.0)
    assert 400 < costs.latest.mean_output_tokens < 700


def test_silence_is_not_taken_for_decoding() -> None:
    costs, spec = CostModel(DEFAULT_STEP_TIME), make_spec()
    busy = make_load(num_used_blocks=50, num_running=1, step_time_s=0.01)
    costs.reported(spec, busy, 3600.0, busy, 3600.0)
    assert costs.latest.mean_output_tokens < 500


def test_instances_of_another_kind_learn_by_themselves() -> None:
    costs, rng = CostModel(DEFAULT_STEP_TIME), random.Random(4)
    small, large = make_spec("a"), make_spec("b", num_total_blocks=1000)
    idle = make_load()
    for second in range(300):
        load = make_load(step=step_of(H100, rng))
        costs.reported(small, idle, 1.0, load, float(second))
    costs.reported(large, idle, 1.0, idle, 300.0)
    assert costs.latest.step_time == DEFAULT_STEP_TIME
    costs.reported(small, idle, 1.0, idle, 301.0)
    assert costs.latest.step_time.base_s < 0.01


def test_going_on_from_a_checkpoint_changes_nothing() -> None:
    one, rng, spec = CostModel(DEFAULT_STEP_TIME), random.Random(5), make_spec()
    busy = make_load(num_used_blocks=50, num_running=3, step_time_s=0.02)

    def go_on(costs: CostModel, seed: int) -> None:
        steps = random.Random(seed)
        for second in range(100):
            load = make_load(
                num_used_blocks=50, num_running=3, step_time_s=0.02, step=step_of(H100, steps)
            )
            costs.reported(spec, busy, 0.1, load, 1000.0 * seed + second)
            costs.ended()

    go_on(one, rng.randrange(1, 5))
    other = CostModel(DEFAULT_STEP_TIME)
    other.restore(json.loads(json.dumps(one.state(), allow_nan=False)))
    assert other.latest == one.latest
    go_on(one, 7)
    go_on(other, 7)
    assert other.latest == one.latest
