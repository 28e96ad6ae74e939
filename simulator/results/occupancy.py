"""How full the pool was over time, out of the samples that load reports leave in a time line.

Between two of its samples an instance is as the earlier one says, and it counts until it is gone; a
mean is over time, so that it does not matter how often somebody looked. This module does not know
requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llumsched.simulator.results.result import SimulationResult
from llumsched.simulator.traces.trace import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupancy:
    """Means over time, from the first sample to `until_s`; NaN without a time line."""

    kv_usage: float
    """Share of the KV blocks in use or reserved."""
    fragmentation: float
    """Share of the KV blocks that were free while some instance had a request waiting."""


def occupancy(result: SimulationResult, until_s: float) -> Occupancy:
    """The occupancy of a result until a moment of it."""
    timeline = result.timeline
    if timeline is None or not len(timeline.time_s):
        return Occupancy(kv_usage=math.nan, fragmentation=math.nan)
    gone_s = np.array([life.gone_s for life in result.instances])
    leaves = np.flatnonzero(~np.isnan(gone_s))
    instance = np.concatenate([timeline.instance, leaves])
    time_s = np.concatenate([timeline.time_s, gone_s[leaves]])
    order = np.argsort(time_s, kind="stable")
    instance, time_s = instance[order], time_s[order]
    lasts_s = np.diff(time_s, append=max(until_s, time_s[-1]))
    # What is after `until_s` does not count.
    lasts_s = np.maximum(np.minimum(lasts_s, until_s - time_s), 0.0)
    if not lasts_s.sum() > 0:
        lasts_s = np.ones_like(time_s)

    def pool(values: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Floats:
        """The sum over the instances of their latest values, at each sample."""
        rows = np.concatenate([values, np.zeros(len(leaves), dtype=np.int64)])[order]
        changes = rows.astype(np.float64)
        by_instance = np.argsort(instance, kind="stable")
        same = instance[by_instance][1:] == instance[by_instance][:-1]
        changes[by_instance[1:]] -= np.where(same, rows[by_instance[:-1]], 0)
        return np.cumsum(changes)

    free = pool(timeline.num_free_blocks)
    used = pool(timeline.num_used_blocks + timeline.num_reserved_blocks)
    waiting = pool(timeline.num_waiting)
    total = np.maximum(free + used, 1.0)

    def mean(share: Floats) -> float:
        return float(np.average(share, weights=lasts_s))

    return Occupancy(
        kv_usage=mean(used / total),
        fragmentation=mean(np.where(waiting > 0, free / total, 0.0)),
    )
