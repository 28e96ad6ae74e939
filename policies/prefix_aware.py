"""For multi-turn chat and shared system prompts: longest cached prefix, bounded by load.

As in Preble (2024) and SGLang's cache-aware router: follow the cache while the load allows, balance
otherwise. Departure: matches come from the engines' own KV events, not from a guess by past
routing.

Invariant: an instance with more than `max_imbalance` requests above the least loaded one is never
chosen for its cache.
"""

from dataclasses import dataclass

from llumsched.core.options import SchedulerOptions
from llumsched.core.params import param
from llumsched.core.policy import Placement, PolicyBundle
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.core.types import SchedulingRequest
from llumsched.policies.freeness_pairs import FreenessPairs
from llumsched.policies.freeness_range import FreenessRange
from llumsched.policies.low_priority_short import LowPriorityShort

INDEX_BLOCKS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPrefix:
    """Send a request where most of its prompt is cached, if that instance is not overloaded."""

    max_imbalance: int = param(
        8,
        "Requests an instance may have above the least loaded one and still be chosen.",
        at_least=0,
    )
    min_match_blocks: int = param(1, "A shorter match counts as none.", at_least=1)

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        c = cluster.columns
        candidates = cluster.candidates(request)
        holders = cluster.match_prefix(request)
        least = cluster.argmin(c.num_requests, candidates) if holders else None
        for num_blocks, rows in holders:
            if least is None or num_blocks < self.min_match_blocks:
                break
            balanced = rows[c.num_requests[rows] <= c.num_requests[least] + self.max_imbalance]
            if candidates is not None:
                balanced = balanced[candidates[balanced]]
            # Of equal matches (a system prompt that all have), the freest.
            row = cluster.argmax(c.freeness, balanced)
            if row is not None:
                return Placement(
                    instance_id=cluster.instance_ids[row],
                    reason=f"{num_blocks} of {len(request.prefix_hashes)} blocks cached",
                )
        row = cluster.argmax(c.freeness, candidates)
        if row is None:
            return None
        return Placement(
            instance_id=cluster.instance_ids[row],
            reason=f"nothing cached within the load bound; freeness={c.freeness.item(row):.1f}",
        )


def bundle() -> PolicyBundle:
    """For shared prefixes: longest cached prefix against load, then as the latency bundle."""
    return PolicyBundle(
        name="prefix_aware",
        dispatch=CachedPrefix(),
        migration=FreenessPairs(),
        scaling=FreenessRange(),
        victim=LowPriorityShort(),
        options=SchedulerOptions(prefix_index_blocks=INDEX_BLOCKS),
    )
