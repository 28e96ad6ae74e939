"""Durations of a step, of many steps, and of a copy of KV, in whole picoseconds.

While a batch of b decodes does not change, every step reads b more tokens than the one before, so
the durations of the steps are an arithmetic series: `first, first + increment, ...`. Its sum, and
the step that is under way at a given time, follow without walking it:

    sum of k steps = k * first + increment * k * (k - 1) / 2

Coefficients are rounded to whole picoseconds once, so that the sum is exact: it equals that of the
same steps one by one. This module does not know batches (`engine_base`) or files (`hardware`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Protocol

from llumsched.simulator.hardware.spec import CopyCoefficients, StepCoefficients
from llumsched.simulator.kernel import to_ps


class CostModel(Protocol):
    """Questions of an engine model to a cost model.

    `base` is the time by number of tokens in the step; the other terms are added to it. `kv_token`
    is also what each step of a series adds for each decode.
    """

    base: list[int]
    request: int
    kv_token: int
    skew_token: int
    half_pair: float


class StepCost:
    """The coefficients of a hardware file, as integers and a table of up to `max_tokens` tokens.

    `slowdown` lengthens every step by this share: KV is being copied.
    """

    __slots__ = ("base", "half_pair", "kv_token", "request", "skew_token")

    def __init__(
        self, coefficients: StepCoefficients, max_tokens: int, slowdown: float = 0.0
    ) -> None:
        factor = 1.0 + slowdown
        c = coefficients
        self.base = [
            to_ps((c.host_s + tokens_s(c, num_tokens)) * factor)
            for num_tokens in range(max_tokens + 1)
        ]
        self.request = to_ps(c.request_s * factor)
        self.kv_token = to_ps(c.kv_token_s * factor)
        self.skew_token = to_ps(c.skew_token_s * factor)
        self.half_pair = c.prefill_pair_s * factor * to_ps(1.0) / 2

    def step(
        self,
        *,
        num_prefill_tokens: int,
        twice_prefill_pairs: int,
        num_decodes: int,
        num_kv_tokens: int,
        num_skew_tokens: int = 0,
    ) -> int:
        """Duration of one step. A chunk of c tokens after a context of n has `c * (2 n + c)` pairs,
        counted twice; `num_kv_tokens` are the tokens of context of all decodes together."""
        return (
            self.base[num_prefill_tokens + num_decodes]
            + self.request * num_decodes
            + self.kv_token * num_kv_tokens
            + self.skew_token * num_skew_tokens
            + round(self.half_pair * twice_prefill_pairs)
        )


def tokens_s(coefficients: StepCoefficients, num_tokens: int) -> float:
    """Seconds that the tokens of a step take: a line with a floor, or the table."""
    table = coefficients.table
    if not table:
        return max(coefficients.floor_s, coefficients.token_s * num_tokens)
    following = min(bisect_left(table, (num_tokens,)), len(table) - 1)
    (x0, y0), (x1, y1) = table[max(0, following - 1)], table[max(1, following)]
    if num_tokens <= x0:
        return y0
    return y0 + (y1 - y0) * (num_tokens - x0) / (x1 - x0)


def copy_ps(coefficients: CopyCoefficients, num_tokens: int) -> int:
    """Duration of copying the KV of this many tokens."""
    return to_ps(coefficients.base_s + coefficients.token_s * num_tokens)


def series_ps(first: int, increment: int, num_steps: int) -> int:
    """Duration of `num_steps` steps of a batch that does not change."""
    return num_steps * first + increment * (num_steps * (num_steps - 1) // 2)


def steps_until(first: int, increment: int, elapsed: int) -> int:
    """The smallest number of steps, at least 1, whose sum is not less than `elapsed`: the step
    under way after that time, or ending just then."""
    if not increment:
        return max(1, -(-elapsed // first))
    half = increment / 2
    linear = first - half
    k = int((math.sqrt(linear * linear + 4.0 * half * elapsed) - linear) / increment)
    # The root is right to about one step; the rest is exact.
    if k < 1:
        k = 1
    last = first + increment * (k - 1)
    total = k * first + increment * (k * (k - 1) // 2)
    while total < elapsed:
        k += 1
        last += increment
        total += last
    while k > 1 and total - last >= elapsed:
        k -= 1
        total -= last
        last -= increment
    return k
