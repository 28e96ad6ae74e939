"""A fit finds the coefficients that steps were made with, and says how far off it is elsewhere."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET

import msgspec
import numpy as np
import pytest

from llumsched.core.step_time import MeasuredStep
from llumsched.simulator.engines.cost import tokens_s
from llumsched.simulator.hardware.residual_plot import residual_plot
from llumsched.simulator.hardware.step_fit import FitError, fit_steps

KV_TOKEN_S, SKEW_TOKEN_S, PAIR_S = 2e-7, 5e-8, 3e-9


def make_samples(*, noise: float = 0.0, is_skewed: bool = True) -> list[MeasuredStep]:
    rng = random.Random(1)
    samples = []
    for _ in range(400):
        num_decodes = rng.randrange(64)
        chunk = rng.choice([0, 0, 16, 128, 512]) or (0 if num_decodes else 16)
        num_kv_tokens = num_decodes * rng.randrange(1, 2000)
        num_skew_tokens = rng.randrange(num_kv_tokens + 1) if is_skewed else 0
        num_pairs = chunk * (chunk + 1) // 2 + chunk * rng.randrange(1000)
        seconds = (
            max(1e-2, 5e-5 * (chunk + num_decodes))
            + KV_TOKEN_S * num_kv_tokens
            + SKEW_TOKEN_S * num_skew_tokens
            + PAIR_S * num_pairs
        )
        samples.append(
            MeasuredStep(
                num_prefill_tokens=chunk,
                num_pairs=num_pairs,
                num_decodes=num_decodes,
                num_kv_tokens=num_kv_tokens,
                num_skew_tokens=num_skew_tokens,
                seconds=seconds * (1 + noise * rng.uniform(-1, 1)),
            )
        )
    return samples


def test_what_steps_were_made_with_is_found() -> None:
    found = fit_steps(make_samples())
    step = found.coefficients
    assert step.kv_token_s == pytest.approx(KV_TOKEN_S, rel=0.02)
    assert step.skew_token_s == pytest.approx(SKEW_TOKEN_S, rel=0.1)
    assert step.prefill_pair_s == pytest.approx(PAIR_S, rel=0.05)
    assert tokens_s(step, 32) == pytest.approx(1e-2, rel=0.02)
    assert tokens_s(step, 512) == pytest.approx(2.56e-2, rel=0.02)
    assert found.held_out_error < 0.01


def test_the_error_is_that_of_steps_which_had_no_part() -> None:
    assert fit_steps(make_samples(noise=0.1)).held_out_error == pytest.approx(0.05, abs=0.02)


def test_a_tenth_of_the_steps_being_far_too_long_changes_little() -> None:
    samples = make_samples()
    disturbed = [
        msgspec.structs.replace(sample, seconds=sample.seconds * (5.0 if i % 10 == 3 else 1.0))
        for i, sample in enumerate(samples)
    ]
    step = fit_steps(disturbed).coefficients
    assert step.kv_token_s == pytest.approx(KV_TOKEN_S, rel=0.1)
    assert tokens_s(step, 32) == pytest.approx(1e-2, rel=0.1)


def test_a_size_that_only_steps_without_a_part_have_is_on_the_line() -> None:
    """Every fourth step has none: the only one of 256 tokens is such a step."""
    sizes = [16, 32, 64, 128, 512] * 5
    sizes.insert(12, 256)
    samples = [
        MeasuredStep(
            num_prefill_tokens=size,
            num_pairs=0,
            num_decodes=0,
            num_kv_tokens=0,
            num_skew_tokens=0,
            seconds=0.01 + 0.001 * size,
        )
        for size in sizes
    ]
    assert tokens_s(fit_steps(samples).coefficients, 256) == pytest.approx(0.266)


def test_a_term_that_no_step_has_is_zero() -> None:
    assert fit_steps(make_samples(is_skewed=False)).coefficients.skew_token_s == 0.0


def test_no_term_is_negative_whatever_was_measured() -> None:
    samples = [
        MeasuredStep(
            num_prefill_tokens=0,
            num_pairs=0,
            num_decodes=1 + i % 4,
            num_kv_tokens=100 * i,
            num_skew_tokens=0,
            seconds=1.0 / (1 + i),
        )
        for i in range(40)
    ]
    step = fit_steps(samples).coefficients
    assert step.kv_token_s == 0.0
    assert all(seconds >= 0 for _, seconds in step.table)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(FitError, match="19 steps were measured; at least 20 are needed"):
        fit_steps(make_samples()[:19])


def test_the_plot_has_a_dot_a_step_and_is_well_formed() -> None:
    measured = np.array([0.01, 0.02, 0.04])
    text = residual_plot(measured, measured * np.array([1.0, 3.0, 0.9]), title="a < b")
    dots = [
        element
        for group in ET.fromstring(text).iter()
        if group.get("id") == "residuals"
        for element in group.iter("{http://www.w3.org/2000/svg}use")
    ]
    assert len(dots) == 3
    heights = [float(dot.attrib["y"]) for dot in dots]
    assert heights[1] < heights[0] < heights[2]
    again = residual_plot(measured, measured * np.array([1.0, 3.0, 0.9]), title="a < b")
    assert text == again, "the same figure is the same bytes"
