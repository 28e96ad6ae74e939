"""llm-d's router with the weights of its optimised baseline (llm-d-router, August 2026).

Each scorer gives an instance 0 to 1, and the highest weighted sum takes the request: a short queue
(2), free KV cache (2), the share of the prompt that is cached (3), and for a prompt that is cached
nowhere the instance whose last such prompt is the longest ago (2).

Departures: cached prefixes are those that the engines report, as in its precise mode, not an
estimate from past routing; ties go to the lowest instance id instead of a draw; load is what the
scheduler has sent as well as what is reported. Invariant: the choice depends on the order of cold
prompts and the present load alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llumsched.core.options import SchedulerOptions
from llumsched.core.params import param
from llumsched.core.policy import Placement, PolicyBundle
from llumsched.core.snapshot import ClusterSnapshot, FloatColumn
from llumsched.core.types import SchedulingRequest
from llumsched.policies.prefix_aware import INDEX_BLOCKS


@dataclass(slots=True, kw_only=True)
class WeightedScorers:
    """Send each request to the highest weighted sum of queue, cache use, prefix and recency."""

    queue_weight: float = param(2.0, "Weight of a short queue.", at_least=0)
    kv_weight: float = param(2.0, "Weight of free KV cache.", at_least=0)
    prefix_weight: float = param(3.0, "Weight of the share of the prompt cached.", at_least=0)
    cold_weight: float = param(
        2.0, "Weight of not having had a prompt without cached prefix for long.", at_least=0
    )
    _last_cold: dict[str, int] = field(default_factory=dict, init=False)
    _num_cold: int = field(default=0, init=False)

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        c = cluster.columns
        score = c.num_used_blocks * (-self.kv_weight)
        score /= c.num_total_blocks
        # A queue here is what is beyond the batch: of what was sent and not reported nobody knows.
        shortest, longest = float(c.num_waiting.min(initial=0)), float(c.num_waiting.max(initial=0))
        if longest > shortest:
            score -= c.num_waiting * (self.queue_weight / (longest - shortest))
        holders = cluster.match_prefix(request)
        for num_blocks, rows in holders:
            num_all = max(1, len(request.prefix_hashes))
            score[rows] += self.prefix_weight * num_blocks / num_all
        if not holders:
            score += self._recency(cluster)
        row = cluster.argmax(score, cluster.candidates(request))
        if row is None:
            return None
        instance_id = cluster.instance_ids[row]
        if not holders:
            self._num_cold += 1
            self._last_cold[instance_id] = self._num_cold
        return Placement(instance_id=instance_id, reason=f"score {score.item(row):.2f}")

    def _recency(self, cluster: ClusterSnapshot) -> FloatColumn:
        """The longer ago its last cold prompt, the higher, by rank."""
        ids = cluster.instance_ids
        if len(self._last_cold) > 2 * len(ids):
            self._last_cold = {i: n for i, n in self._last_cold.items() if i in cluster.rows}
        get = self._last_cold.get
        last = np.fromiter((get(i, 0) for i in ids), dtype=np.float64, count=len(ids))
        rank = last.argsort(kind="stable").argsort(kind="stable")
        # Those that never had one are equal.
        rank[last == 0] = 0
        score: FloatColumn = rank * (-self.cold_weight / max(1, len(ids) - 1))
        return score

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"last_cold": dict(self._last_cold), "num_cold": self._num_cold}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._last_cold = dict(state["last_cold"])
        self._num_cold = state["num_cold"]


def bundle() -> PolicyBundle:
    """Comparison: weighted scorers of queue, cache use and prefix, no migration (llm-d)."""
    return PolicyBundle(
        name="llm_d",
        dispatch=WeightedScorers(),
        options=SchedulerOptions(prefix_index_blocks=INDEX_BLOCKS),
    )
