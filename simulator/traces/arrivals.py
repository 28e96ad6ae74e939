"""Arrival times: drawn from a Gamma process, or put back where a trace has rounded them away.

Everything is drawn from a generator that the caller hands in; nothing here knows lengths.
"""

from __future__ import annotations

import numpy as np

from llumsched.simulator.traces.trace import Floats, TraceError

# Below this, requests that share a time stamp may well have arrived together.
_SMALLEST_QUANTUM_S = 0.5
_FEWEST_REQUESTS = 20


def gamma_arrivals(
    num_requests: int, *, rate_rps: float, cv: float, rng: np.random.Generator
) -> Floats:
    """Times of a renewal process with Gamma gaps of this mean rate; `cv` 1 is Poisson.

    Gaps have shape 1/cv^2 and scale cv^2/rate (Llumnix, OSDI '24, section 6.1), so that the
    coefficient of variation of the gaps is `cv`.

    Raises:
        TraceError: rate or cv is not positive.
    """
    for name, value in (("rate", rate_rps), ("cv", cv)):
        if not 0 < value < float("inf"):
            raise TraceError(f"{name} must be above 0, not {value!r}")
    return np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate_rps, size=num_requests))


def quantum_s(arrival_s: Floats) -> float | None:
    """The clock tick of times that were rounded to one, or None where they were not.

    Rounded means that on average more than two requests share a time stamp and that the stamps are
    at least half a second apart.
    """
    distinct = np.unique(arrival_s)
    if len(arrival_s) < _FEWEST_REQUESTS or 2 * len(distinct) >= len(arrival_s):
        return None
    gap = float(np.median(np.diff(distinct)))
    return gap if gap >= _SMALLEST_QUANTUM_S else None


def spread(arrival_s: Floats, *, quantum: float, rng: np.random.Generator) -> Floats:
    """Each time moved later by a uniform share of the tick; who came first still comes first.

    Replayed as they stand, rounded times are bursts that never happened.
    """
    return np.sort(arrival_s + rng.uniform(0, quantum, size=len(arrival_s)))
