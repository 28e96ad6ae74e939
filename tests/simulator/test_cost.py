"""Durations: exact sums, and the step that is under way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llumsched.simulator.engines.cost import StepCost, series_ps, steps_until, tokens_s
from llumsched.simulator.hardware.kv_shape import (
    activated_parameters,
    attention_kv_bytes,
    latent_kv_bytes,
    tensor_parallel_kv_bytes,
)
from llumsched.simulator.hardware.spec import StepCoefficients
from llumsched.simulator.kernel import MESSAGE, NEVER, STEP, Kernel, to_ps, to_s

FIRST = st.integers(1, 10**12)
INCREMENT = st.integers(0, 10**9)


@given(first=FIRST, increment=INCREMENT, num_steps=st.integers(0, 200))
def test_a_series_is_the_sum_of_its_steps(first: int, increment: int, num_steps: int) -> None:
    assert series_ps(first, increment, num_steps) == sum(
        first + increment * i for i in range(num_steps)
    )


@given(first=FIRST, increment=INCREMENT, elapsed=st.integers(1, 10**15))
def test_the_step_under_way_ends_at_or_after_the_time(
    first: int, increment: int, elapsed: int
) -> None:
    k = steps_until(first, increment, elapsed)
    assert k >= 1
    assert series_ps(first, increment, k) >= elapsed
    assert k == 1 or series_ps(first, increment, k - 1) < elapsed


def test_tokens_take_the_floor_or_their_slope() -> None:
    line = StepCoefficients(floor_s=0.01, token_s=0.001)
    assert [tokens_s(line, n) for n in (0, 5, 10, 20)] == [0.01, 0.01, 0.01, 0.02]


def test_a_table_is_interpolated_and_continued() -> None:
    table = StepCoefficients(table=((1, 1.0), (3, 2.0), (7, 4.0)))
    assert [tokens_s(table, n) for n in (0, 1, 2, 3, 5, 7, 9)] == [1, 1, 1.5, 2, 3, 4, 5]


def test_a_step_adds_its_terms() -> None:
    coefficients = StepCoefficients(
        host_s=1.0,
        token_s=0.1,
        request_s=0.01,
        kv_token_s=0.001,
        skew_token_s=0.0001,
        prefill_pair_s=0.00002,
    )
    batch = {
        "num_prefill_tokens": 3,
        "twice_prefill_pairs": 10,
        "num_decodes": 2,
        "num_kv_tokens": 4,
        "num_skew_tokens": 5,
    }
    expected = 1.0 + 0.5 + 0.02 + 0.004 + 0.0005 + 0.0001
    assert StepCost(coefficients, 10).step(**batch) == to_ps(expected)
    assert StepCost(coefficients, 10, slowdown=0.5).step(**batch) == to_ps(expected * 1.5)


def test_kv_bytes_follow_from_the_shape() -> None:
    llama_7b = attention_kv_bytes(num_layers=32, num_kv_heads=32, head_size=128)
    assert llama_7b == 512 * 1024
    llama_3_8b = attention_kv_bytes(num_layers=32, num_kv_heads=8, head_size=128)
    assert llama_3_8b == 128 * 1024
    deepseek_v3 = latent_kv_bytes(num_layers=61, latent_size=512, rope_size=64)
    assert deepseek_v3 == 70_272
    assert tensor_parallel_kv_bytes(llama_3_8b, 8, 4) == 32 * 1024
    assert tensor_parallel_kv_bytes(llama_3_8b, 8, 16) == 16 * 1024
    assert tensor_parallel_kv_bytes(deepseek_v3, 1, 8) == deepseek_v3


def test_a_token_activates_the_experts_it_is_sent_to() -> None:
    assert (
        activated_parameters(
            num_shared_parameters=100,
            num_expert_layers=3,
            parameters_per_expert=7,
            experts_per_token=2,
        )
        == 142
    )


def test_at_one_instant_messages_come_before_steps_and_each_in_order() -> None:
    kernel = Kernel()
    assert kernel.next_time() == NEVER
    kernel.step(5, 1, "step of instance 1")
    kernel.step(5, 0, "step of instance 0")
    kernel.send(5, "first message")
    kernel.send(5, "second message")
    kernel.send(4, "earlier")
    assert kernel.next_time() == 4
    entries = [kernel.pop() for _ in range(5)]
    assert [entry[3] for entry in entries] == [
        "earlier",
        "first message",
        "second message",
        "step of instance 0",
        "step of instance 1",
    ]
    assert [entry[1] for entry in entries[1:]] == [MESSAGE, MESSAGE, STEP, STEP]
    assert kernel.now == 5
    assert to_s(to_ps(1.5)) == 1.5
