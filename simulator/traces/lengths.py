"""Distributions of prompt and output lengths.

The three of the paper's generator are exact, down to the random stream; the others follow published
quantiles. Nothing here knows arrivals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from llumsched.simulator.traces.trace import Ints

PAPER_SEED = 0xCADE
PAPER_NUM_REQUESTS = 10_000
PAPER_MAX_TOKENS = 6144


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerLaw:
    """Ranks 1 .. 2 x mean - 1 with probability rank^-alpha, stretched to the mean."""

    mean: int
    alpha: float


PAPER_LENGTHS: Mapping[str, PowerLaw] = MappingProxyType(
    {
        "S": PowerLaw(mean=128, alpha=2.0),
        "M": PowerLaw(mean=256, alpha=1.5),
        "L": PowerLaw(mean=512, alpha=1.15),
    }
)
"""Short, medium and long of Llumnix (OSDI '24, Table 1), from its public artifact."""


def paper_lengths(kind: str, num_requests: int, stream: np.random.RandomState) -> Ints:
    """Lengths of one kind, drawn from NumPy's legacy generator as the artifact does.

    With `PAPER_NUM_REQUESTS` and a stream seeded with `PAPER_SEED`, inputs first and outputs
    second, these are the very lengths of the paper.
    """
    law = PAPER_LENGTHS[kind]
    ranks = np.arange(1, 2 * law.mean)
    weights = ranks**-law.alpha
    drawn = stream.choice(ranks, size=num_requests, p=weights / weights.sum())
    stretched = np.ceil(drawn * (law.mean / drawn.mean()))
    lengths: Ints = np.minimum(stretched, PAPER_MAX_TOKENS).astype(np.int64)
    return lengths


Quantiles = Sequence[tuple[float, float]]
"""(cumulative share, tokens), both increasing, from share 0 to share 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantileLengths:
    """Prompts and outputs by their published quantiles, independent of each other."""

    prompt: Quantiles
    output: Quantiles


QUANTILE_LENGTHS: Mapping[str, QuantileLengths] = MappingProxyType(
    {
        "sharegpt": QuantileLengths(
            prompt=((0, 4), (0.5, 74), (0.8, 348), (0.95, 1484), (0.99, 3388), (1, 4096)),
            output=((0, 4), (0.5, 487), (0.8, 781), (0.95, 988), (0.99, 1234), (1, 1300)),
        ),
        "burstgpt": QuantileLengths(
            prompt=((0, 4), (0.5, 582), (0.8, 1427), (0.95, 2345), (0.99, 3549), (1, 4096)),
            output=((0, 4), (0.5, 243), (0.8, 434), (0.95, 669), (0.99, 964), (1, 1100)),
        ),
    }
)
"""P50 to P99 of Llumnix (OSDI '24, Table 1); both ends are ours, and linear in between."""


def quantile_lengths(quantiles: Quantiles, num_requests: int, rng: np.random.Generator) -> Ints:
    """Lengths that follow the quantiles, with straight lines between them."""
    shares, tokens = zip(*quantiles, strict=True)
    drawn = np.interp(rng.random(num_requests), shares, tokens)
    lengths: Ints = np.ceil(drawn).astype(np.int64)
    return lengths


def lognormal_lengths(
    median: float, sigma: float, num_requests: int, rng: np.random.Generator, *, at_most: int
) -> Ints:
    """Log-normal lengths in [1, at_most]; `sigma` is that of the logarithm."""
    drawn = rng.lognormal(np.log(median), sigma, size=num_requests)
    lengths: Ints = np.clip(np.ceil(drawn), 1, at_most).astype(np.int64)
    return lengths
