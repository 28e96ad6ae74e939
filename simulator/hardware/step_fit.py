"""Fitting the step-time model to measured steps.

    step = table(tokens) + kv_token * context of the decodes + skew_token * skew + pair * pairs

The table is linear between knots at powers of two, so every term is linear in what is fitted. What
is made small is the sum of relative errors, not of their squares (by weighting least squares over
and over), as a machine that is not quite idle makes some steps much longer; and no term may be
negative. Every fourth step has no part in the fit; the error that is reported is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llumsched.core.step_time import MeasuredStep
from llumsched.simulator.hardware.spec import StepCoefficients
from llumsched.simulator.traces.trace import Floats

_HELD_OUT = 4
_FEWEST_STEPS = 20
_REWEIGHTINGS = 20
# Errors below this count alike: a fit need not be better.
_SMALL_ERROR = 0.01


class FitError(ValueError):
    """There are too few steps to fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFit:
    """Coefficients, and what they say of every sample."""

    coefficients: StepCoefficients
    measured_s: Floats
    predicted_s: Floats
    held_out_error: float
    """Mean relative error of the steps that had no part in the fit."""


def fit_steps(samples: Sequence[MeasuredStep]) -> StepFit:
    """The coefficients that fit these steps best.

    Raises:
        FitError: there are fewer than twenty.
    """
    if len(samples) < _FEWEST_STEPS:
        raise FitError(
            f"{len(samples)} steps were measured; at least {_FEWEST_STEPS} are needed: measure"
            " for longer"
        )
    tokens = np.array([s.num_prefill_tokens + s.num_decodes for s in samples], dtype=np.float64)
    held_out = np.arange(len(samples)) % _HELD_OUT == 0
    knots = _knots(tokens[~held_out])
    others = np.array(
        [(s.num_kv_tokens, s.num_skew_tokens, s.num_pairs) for s in samples], dtype=np.float64
    )
    terms = np.concatenate([_hats(tokens, knots), others], axis=1)
    seconds = np.array([s.seconds for s in samples], dtype=np.float64)
    solution = _least_errors(terms[~held_out], seconds[~held_out])
    predicted: Floats = terms @ solution
    errors = np.abs(predicted / seconds - 1)
    kv_token, skew_token, pair = solution[len(knots) :].tolist()
    return StepFit(
        coefficients=StepCoefficients(
            table=tuple(
                (int(knot), float(f"{value:.5g}"))
                for knot, value in zip(knots, solution, strict=False)
            ),
            kv_token_s=kv_token,
            skew_token_s=skew_token,
            prefill_pair_s=pair,
        ),
        measured_s=seconds,
        predicted_s=predicted,
        held_out_error=float(errors[held_out].mean()),
    )


def _knots(tokens: Floats) -> Floats:
    """Powers of two that have a step near them, and both ends."""
    powers = 2.0 ** np.arange(0, 1 + np.ceil(np.log2(tokens.max())))
    near = [p for p in powers if ((tokens > p / 1.5) & (tokens < p * 1.5)).any()]
    knots: Floats = np.unique([tokens.min(), *near, tokens.max()])
    knots = knots[(knots >= tokens.min()) & (knots <= tokens.max())]
    return knots if len(knots) > 1 else np.array([knots[0], knots[0] + 1])


def _hats(tokens: Floats, knots: Floats) -> Floats:
    """A column a knot: its weight in the line between the knots on either side."""
    return np.stack([np.interp(tokens, knots, row) for row in np.eye(len(knots))], axis=1)


def _least_errors(terms: Floats, seconds: Floats) -> Floats:
    """Least sum of relative errors, by least squares with the weights of the errors before."""
    weights = np.ones(len(seconds))
    solution = _non_negative(terms, seconds, weights)
    for _ in range(_REWEIGHTINGS):
        errors = np.abs(terms @ solution / seconds - 1)
        weights = 1 / np.sqrt(np.maximum(errors, _SMALL_ERROR))
        solution = _non_negative(terms, seconds, weights)
    return solution


def _non_negative(terms: Floats, seconds: Floats, weights: Floats) -> Floats:
    """Least squares of relative errors; terms that come out negative are left out, the worst first.

    A term that no step has (no batch was unequal, say) is zero.
    """
    weighted = terms / seconds[:, None] * weights[:, None]
    scale = np.maximum(np.abs(weighted).max(axis=0), 1e-300)
    kept = [i for i in range(terms.shape[1]) if np.abs(terms[:, i]).max() > 0]
    solution = np.zeros(terms.shape[1])
    while kept:
        found, *_ = np.linalg.lstsq(weighted[:, kept] / scale[kept], weights, rcond=None)
        if found.min() >= 0:
            solution[kept] = found / scale[kept]
            break
        kept.pop(int(found.argmin()))
    return solution
