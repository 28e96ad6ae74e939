"""Sizing: the least number of instances, or the highest rate, with which an objective is kept.

Both are found by doubling until the answer is between two values, and halving what lies between.
That the share of kept requests falls with the rate and rises with instances is assumed, and true
but for chance close to the answer; so the answer is a size that keeps the objective beside one that
does not. This module does not know what is tried (`scenario`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

RATE_PRECISION = 0.02
"""A rate is found to this share of itself."""
_MOST_DOUBLINGS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """`best` keeps the objective, `next_worse` was tried and does not; None where there is none."""

    best: float | None
    next_worse: float | None


def least_instances(keeps: Callable[[int], bool], start: int, most: int) -> Found:
    """The fewest instances that keep the objective; those beyond `most` change nothing."""
    low, high = 0, start
    while not keeps(high):
        if high >= most:
            return Found(best=None, next_worse=high)
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if keeps(middle):
            high = middle
        else:
            low = middle
    return Found(best=high, next_worse=low or None)


def highest_rate(keeps: Callable[[float], bool], start_rps: float) -> Found:
    """The highest rate at which the objective is kept, to 2 %."""
    low, high = 0.0, start_rps
    for _ in range(_MOST_DOUBLINGS):
        if not keeps(high):
            break
        low, high = high, 2 * high
    else:
        return Found(best=low, next_worse=None)
    for _ in range(_MOST_DOUBLINGS):
        if low:
            break
        if keeps(high / 2):
            low = high / 2
        else:
            high /= 2
    else:
        return Found(best=None, next_worse=high)
    while high - low > RATE_PRECISION * high:
        middle = float(f"{(low + high) / 2:.4g}")
        if keeps(middle):
            low = middle
        else:
            high = middle
    return Found(best=low, next_worse=high)
