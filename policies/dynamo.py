"""NVIDIA Dynamo's KV router: one cost of prefill and decode blocks, and a softmax over it.

    cost = overlap_weight * prefill blocks left to compute + decode blocks

The lowest cost wins; with a temperature an instance is drawn with probability proportional to
exp(-normalised cost / temperature), which spreads ties and stale views. Source: the router of
ai-dynamo (`kv_router`, 2025). Departure: decode blocks are the blocks in use as the engines report
them, where Dynamo keeps its own count per request.

Invariant: at temperature 0 the choice draws no random number.
"""

from dataclasses import dataclass

import numpy as np

from llumsched.core.options import SchedulerOptions
from llumsched.core.params import param
from llumsched.core.policy import Placement, PolicyBundle
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.core.types import SchedulingRequest, Scores
from llumsched.policies.prefix_aware import INDEX_BLOCKS


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRouter:
    """Send each request to a low cost of prefill and decode blocks together."""

    overlap_weight: float = param(
        1.0, "Weight of a prefill block against a decode block.", at_least=0
    )
    temperature: float = param(
        0.0, "0 takes the lowest cost; more draws, the more evenly the higher.", at_least=0
    )

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        c = cluster.columns
        # Pending tokens count in fractions of a block, as Dynamo counts them.
        cost = c.num_prefill_tokens_pending * (self.overlap_weight / (cluster.block_size or 1))
        if cluster.block_size is None:
            cost /= c.block_size
        cost += c.num_used_blocks
        demand = cluster.demand_blocks(request)
        own = self.overlap_weight * demand if isinstance(demand, int) else 0.0
        if not isinstance(demand, int):
            cost += self.overlap_weight * demand
        for num_blocks, rows in cluster.match_prefix(request):
            cost[rows] -= self.overlap_weight * num_blocks
        candidates = cluster.candidates(request)
        row = (
            self._draw(cost, cluster, candidates)
            if self.temperature
            else cluster.argmin(cost, candidates)
        )
        if row is None:
            return None
        # What is the same on every instance decides nothing.
        return Placement(
            instance_id=cluster.instance_ids[row],
            reason=f"cost={cost.item(row) + own:.1f}",
            scores=Scores("cost in blocks", cluster.instance_ids, cost, own),
        )

    def _draw(
        self, cost: np.ndarray, cluster: ClusterSnapshot, candidates: np.ndarray | None
    ) -> int | None:
        rows = np.arange(len(cost)) if candidates is None else np.flatnonzero(candidates)
        if not len(rows):
            return None
        low, high = cost[rows].min(), cost[rows].max()
        normalised = (cost[rows] - low) / (high - low) if high > low else np.zeros(len(rows))
        weights = np.cumsum(np.exp(-normalised / self.temperature))
        drawn = np.searchsorted(weights, cluster.rng.random() * weights[-1], side="right")
        return int(rows[min(int(drawn), len(rows) - 1)])


def bundle() -> PolicyBundle:
    """Comparison: cost of prefill and decode blocks, softmax with a temperature (Dynamo)."""
    return PolicyBundle(
        name="dynamo",
        dispatch=KvRouter(),
        options=SchedulerOptions(prefix_index_blocks=INDEX_BLOCKS),
    )
