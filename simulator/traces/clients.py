"""Requests of many API clients, in the manner of ServeGen (Xiang et al., NSDI '26).

A service's traffic is the sum of few large and many small clients; each has its own rate, its own
burstiness and its own lengths. That is what makes the sum burstier than Poisson and its mix of
lengths drift, neither of which one process with one length distribution shows. The shapes are those
that the paper reports; the numbers below are ours, not fitted to its data.
"""

from __future__ import annotations

import numpy as np

from llumsched.simulator.traces.arrivals import gamma_arrivals
from llumsched.simulator.traces.lengths import lognormal_lengths
from llumsched.simulator.traces.trace import Trace, make_trace

# Client k has a share of the rate proportional to k^-1.2.
_SKEW = 1.2
_MEDIAN_CV = 1.3
_SIGMA_CV = 0.5
_MEDIAN_PROMPT_TOKENS = 300.0
_MEDIAN_OUTPUT_TOKENS = 180.0
# How far the medians of clients lie apart, and how wide the lengths of one client are.
_SIGMA_BETWEEN = 0.9
_SIGMA_WITHIN = 0.7
_MAX_PROMPT_TOKENS = 8192
_MAX_OUTPUT_TOKENS = 2048


def client_trace(*, rate_rps: float, num_requests: int, num_clients: int, seed: int) -> Trace:
    """The first `num_requests` requests of all clients together, at `rate_rps` on average.

    Client ids are `client-1`, the largest, to `client-N`.
    """
    rng = np.random.default_rng([seed, 2])
    shares = np.arange(1, num_clients + 1, dtype=np.float64) ** -_SKEW
    shares /= shares.sum()
    arrivals, clients, prompts, outputs = [], [], [], []
    for client, share in enumerate(shares.tolist(), start=1):
        cv = float(rng.lognormal(np.log(_MEDIAN_CV), _SIGMA_CV))
        prompt_median = float(rng.lognormal(np.log(_MEDIAN_PROMPT_TOKENS), _SIGMA_BETWEEN))
        output_median = float(rng.lognormal(np.log(_MEDIAN_OUTPUT_TOKENS), _SIGMA_BETWEEN))
        # More than its share, so that the common end below cuts every client at the same time.
        count = int(1.3 * share * num_requests + 20 * (1 + cv))
        arrivals.append(gamma_arrivals(count, rate_rps=share * rate_rps, cv=cv, rng=rng))
        prompts.append(
            lognormal_lengths(prompt_median, _SIGMA_WITHIN, count, rng, at_most=_MAX_PROMPT_TOKENS)
        )
        outputs.append(
            lognormal_lengths(output_median, _SIGMA_WITHIN, count, rng, at_most=_MAX_OUTPUT_TOKENS)
        )
        clients += [f"client-{client}"] * count
    trace = make_trace(
        "clients",
        arrival_s=np.concatenate(arrivals),
        num_prompt_tokens=np.concatenate(prompts),
        num_output_tokens=np.concatenate(outputs),
        client_ids=clients,
        notes=(f"{num_clients} synthetic clients at {rate_rps:g} requests/s in all, seed {seed}",),
    )
    return trace.head(num_requests)
