"""Fits find the coefficients that a profile was made with; the files that ship can be loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from llumsched.simulator.engines.cost import tokens_s
from llumsched.simulator.hardware.spec import StepCoefficients, available, load_hardware
from scripts import fit_hardware
from scripts.hardware.profiles import AttentionSteps, Profile

HEAD_S, HEAD_REQUEST_S = 1e-3, 2e-6
CONSTANT_S, REQUEST_S, KV_TOKEN_S, TOKEN_S, PAIR_S = 4e-4, 6e-6, 1.5e-7, 5e-6, 4e-9


def make_profile() -> Profile:
    """A machine whose every operator is as the model says."""
    tokens = np.array([1.0, 64.0, 256.0, 1024.0, 2048.0])
    dense = 1.5e-2 + 8e-5 * tokens
    decode, prefill = [], []
    for n in (1, 8, 64, 256):
        for kv in (16, 128, 1024):
            seconds = CONSTANT_S + REQUEST_S * n + KV_TOKEN_S * n * kv
            decode.append((seconds, 0.0, 0.0, 0.0, n, n * kv))
            for chunk in (256, 1024):
                pairs = chunk * (chunk + 1) / 2
                mixed = seconds + TOKEN_S * chunk + PAIR_S * pairs
                prefill.append((mixed, chunk, 0.0, pairs, n, n * kv))
    return Profile(
        dense=(tokens, dense),
        head_s=HEAD_S,
        head_request_s=HEAD_REQUEST_S,
        decode=AttentionSteps.of(decode),
        prefill=AttentionSteps.of(prefill),
        skew=0.1,
    )


def test_a_fit_finds_what_the_profile_was_made_with() -> None:
    fitted = fit_hardware.fit(make_profile(), num_kv_tokens=300_000)
    assert fitted.kv_token_s == pytest.approx(KV_TOKEN_S, rel=1e-6)
    assert fitted.skew_token_s == pytest.approx(0.1 * KV_TOKEN_S, rel=1e-6)
    assert fitted.prefill_pair_s == pytest.approx(PAIR_S, rel=1e-6)
    assert fitted.request_s == pytest.approx(REQUEST_S + HEAD_REQUEST_S - TOKEN_S, rel=1e-6)
    assert fitted.mean_error == pytest.approx(0.0, abs=1e-9)


def test_a_decode_step_of_the_fit_is_that_of_the_profile() -> None:
    fitted = fit_hardware.fit(make_profile(), num_kv_tokens=300_000)
    step = StepCoefficients(table=tuple(fitted.table))
    n, kv = 64, 64 * 128
    ours = tokens_s(step, n) + fitted.request_s * n + fitted.kv_token_s * kv
    operators = 1.5e-2 + 8e-5 * n + HEAD_S + HEAD_REQUEST_S * n
    attention = CONSTANT_S + REQUEST_S * n + KV_TOKEN_S * kv
    assert ours == pytest.approx(operators + attention, rel=1e-4)


def test_points_far_beyond_the_cache_have_no_part_in_the_fit() -> None:
    fitted = fit_hardware.fit(make_profile(), num_kv_tokens=2_500)
    assert fitted.max_kv_tokens <= 4 * 2_500
    assert len(fitted.decode_errors) == 9


def test_a_straight_line_needs_two_points() -> None:
    fitted = fit_hardware.fit(make_profile(), num_kv_tokens=300_000)
    assert [tokens for tokens, _ in fitted.table] == [1, 2048]


def test_a_written_file_keeps_its_points_on_one_line() -> None:
    profile, target = make_profile(), fit_hardware.TARGETS["rtx4090-llama-3.1-8b"]
    fitted = fit_hardware.fit(profile, num_kv_tokens=300_000)
    text = fit_hardware.as_text(fit_hardware.as_plain(target, profile, fitted))
    assert "\n  - [1, 0.01" in text
    assert yaml.safe_load(text)["step"]["copy_slowdown"] == 0.02


@pytest.mark.parametrize("name", available())
def test_every_file_that_ships_can_be_loaded_and_says_where_it_is_from(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.name == name
    assert len(hardware.source) > 40
    assert 0 <= hardware.fit_error < 0.1
    assert hardware.notes


def test_missing_profiles_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit_hardware.main([str(tmp_path), "rtx4090-llama-3.1-8b"]) == 1
    assert "dense.csv.gz is missing" in capsys.readouterr().err
