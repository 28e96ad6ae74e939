"""Hardware of one model as that of another: each time by what it pays for."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from llumsched.simulator.hardware.model_shape import ModelShape
from llumsched.simulator.hardware.rescale import Other, rescale
from llumsched.simulator.hardware.spec import (
    ComputeShape,
    Hardware,
    HardwareError,
    hardware_from_plain,
    load_hardware,
)
from llumsched.simulator.hardware.yaml_text import hardware_text

BASE = load_hardware("h100-llama-3.1-8b", Path(__file__).parents[2] / "configs" / "hardware")


def scaled(*, compute: float = 1, kv: float = 1, attention: float = 1, split: int = 1) -> Hardware:
    """To a model that is so many times the base's, on so many times its accelerators."""
    assert BASE.shape is not None

    def shape(parts: int) -> ModelShape:
        assert BASE.shape is not None
        return ModelShape(
            compute=ComputeShape(
                activated_parameters=round(compute * BASE.shape.activated_parameters / parts),
                attention_width=round(attention * BASE.shape.attention_width / parts),
            ),
            kv_bytes_per_token=round(kv * BASE.kv.bytes_per_token / parts),
        )

    other = Other(
        name="other",
        model="Other",
        shape=shape(1),
        share=shape(split),
        num_accelerators=split,
        num_blocks=100,
        block_size=16,
    )
    return rescale(BASE, other)


def test_parameters_scale_the_tokens_of_a_step_and_nothing_else() -> None:
    other = scaled(compute=3)
    for (tokens, seconds), (base_tokens, base_s) in zip(
        other.step.table, BASE.step.table, strict=True
    ):
        assert tokens == base_tokens
        assert seconds == pytest.approx(3 * base_s, rel=1e-3)
    assert other.step.kv_token_s == pytest.approx(BASE.step.kv_token_s, rel=1e-3)
    assert other.step.prefill_pair_s == pytest.approx(BASE.step.prefill_pair_s, rel=1e-3)
    assert other.copy.token_s == pytest.approx(BASE.copy.token_s, rel=1e-3)


def test_kv_scales_reading_and_copying_it() -> None:
    other = scaled(kv=0.5)
    assert other.step.kv_token_s == pytest.approx(BASE.step.kv_token_s / 2, rel=1e-3)
    assert other.copy.token_s == pytest.approx(BASE.copy.token_s / 2, rel=1e-3)
    assert other.copy.base_s == BASE.copy.base_s
    assert other.kv.bytes_per_token == BASE.kv.bytes_per_token / 2


def test_heads_scale_the_attention_of_prompts() -> None:
    other = scaled(attention=4)
    assert other.step.prefill_pair_s == pytest.approx(4 * BASE.step.prefill_pair_s, rel=1e-3)


def test_of_several_accelerators_each_has_its_share_and_together_they_hold_all_kv() -> None:
    other = scaled(compute=8, kv=2, split=4)
    assert other.step.table[-1][1] == pytest.approx(2 * BASE.step.table[-1][1], rel=1e-3)
    assert other.kv.bytes_per_token == 2 * BASE.kv.bytes_per_token
    assert other.copy.token_s == pytest.approx(BASE.copy.token_s / 2, rel=1e-3)
    assert other.accelerator.startswith("4 x ")


def test_it_says_that_it_was_not_measured() -> None:
    other = scaled()
    assert math.isnan(other.fit_error)
    assert "None of it was measured" in other.notes[0]


def test_its_text_loads_as_what_it_is() -> None:
    other = scaled(compute=2, kv=3)
    again = hardware_from_plain(yaml.safe_load(hardware_text(other)), "other.yaml")
    assert replace(again, fit_error=0.0) == replace(other, fit_error=0.0)


def test_a_mixture_of_experts_is_refused_with_what_to_do() -> None:
    assert BASE.shape is not None
    shape = ModelShape(compute=BASE.shape, kv_bytes_per_token=1, num_experts=128)
    other = Other(name="moe", model="MoE", shape=shape, share=shape, num_blocks=1, block_size=16)
    with pytest.raises(HardwareError, match=r"a mixture of experts \(128 in a layer\) cannot be"):
        rescale(BASE, other)


def test_a_step_that_no_host_could_prepare_is_refused() -> None:
    """SmolLM2-135M from the file of an 8B model: 0.14 ms a step."""
    assert scaled(compute=0.2).step.table[0][1] > 1e-3
    with pytest.raises(HardwareError, match=r"a step would take 0\.11 ms, less than the host"):
        scaled(compute=0.017)


def test_a_base_without_a_shape_is_refused_with_what_to_add() -> None:
    assert BASE.shape is not None
    other = Other(
        name="other",
        model="Other",
        shape=ModelShape(compute=BASE.shape, kv_bytes_per_token=1),
        share=ModelShape(compute=BASE.shape, kv_bytes_per_token=1),
        num_blocks=1,
        block_size=16,
    )
    with pytest.raises(HardwareError, match="give it a section 'shape'"):
        rescale(replace(BASE, shape=None), other)
