"""Requests that go on where nobody has seen them before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from llumsched.engine.vllm.migration.resumption import (
    RewindableGenerator,
    state_to_resume,
    why_not_resumable,
)
from llumsched.engine.vllm.migration.state import decode_request


def request(**changes: Any) -> EngineCoreRequest:
    values: dict[str, Any] = {
        "request_id": "r",
        "prompt_token_ids": [1, 2, 3],
        "mm_features": None,
        "sampling_params": SamplingParams(max_tokens=9, seed=5, logprobs=2, stop_token_ids=[7]),
        "pooling_params": None,
        "arrival_time": 12.5,
        "lora_request": None,
        "cache_salt": "salt",
        "data_parallel_rank": None,
        "priority": -1,
    }
    return EngineCoreRequest(**(values | changes))


def draw(generator: torch.Generator) -> int:
    return int(torch.randint(0, 2**31, (1,), generator=generator).item())


def seeded(seed: int) -> torch.Generator:
    generator = torch.Generator(device="cpu")
    generator.manual_seed(seed)
    return generator


def test_the_request_is_carried_as_it_was_sent() -> None:
    asked = request()
    state = state_to_resume(asked, [4, 5], placement_number=77)
    assert decode_request(state) == asked
    assert (state.output_token_ids, state.placement_number, state.has_kv) == ([4, 5], 77, False)


def test_the_original_keeps_its_prompt_logprobs() -> None:
    """The request may have to be sent again, from its beginning."""
    sampling = SamplingParams(prompt_logprobs=1)
    asked = request(sampling_params=sampling)
    state_to_resume(asked, [4], placement_number=1)
    assert asked.sampling_params is sampling
    assert sampling.prompt_logprobs == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling_params": None, "pooling_params": PoolingParams()},
        {"prompt_embeds": torch.zeros(3, 4)},
        {"resumable": True},
    ],
)
def test_what_cannot_be_taken_over_says_why(changes: dict[str, Any]) -> None:
    assert why_not_resumable(request()) is None
    assert why_not_resumable(request(**changes))


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_draw_for_part_of_a_prompt_is_taken_back(num_tokens: int) -> None:
    """vLLM samples at the end of every part and takes it back by a GPU's offset."""
    expected = seeded(5)
    for _ in range(num_tokens):
        draw(expected)

    def draw_what_was_delivered(generator: torch.Generator) -> None:
        for _ in range(num_tokens):
            draw(generator)

    before = seeded(5)
    draw_what_was_delivered(before)
    generator = RewindableGenerator(before, seed=5, draw=draw_what_was_delivered)
    for _ in range(2):
        draw(generator)
        generator.set_offset(generator.get_offset() - 4)
    assert draw(generator) == draw(expected)
