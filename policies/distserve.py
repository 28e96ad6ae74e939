"""DistServe (Zhong et al., OSDI '24): fixed pools for the two phases.

FCFS prefill on the instance with the shortest queue, decode on the least loaded. Departures: the
pools' sizes, which DistServe finds by an offline search for the best goodput, are the parameter
`prefill_share`; the pull of KV by the decode side is a live migration pushed by the prefill side.

Invariant: no instance ever helps the other pool, however idle it is.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from llumsched.core.params import param
from llumsched.core.policy import MigrationPair, Placement, PolicyBundle
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.core.types import SchedulingRequest
from llumsched.policies._pools import PREFILL_SHARE_DOC, drain, hand_over, prefill_rows, split
from llumsched.policies.after_first_token import AfterFirstToken
from llumsched.policies.disaggregated import HAND_OVER_OPTIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortestPrefillQueue:
    """Send each request to the prefill instance with the shortest queue, in prompt tokens."""

    prefill_share: float = param(0.5, PREFILL_SHARE_DOC, above=0, at_most=1)

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        pending = cluster.columns.num_prefill_tokens_pending
        among = prefill_rows(cluster, self.prefill_share, cluster.candidates(request))
        row = cluster.argmin(pending, among)
        if row is None:
            return None
        return Placement(
            instance_id=cluster.instance_ids[row],
            reason=f"shortest prefill queue, {pending.item(row):.0f} tokens",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastLoadedDecode:
    """Hand finished prefills to the decode instance with the most free blocks."""

    prefill_share: float = param(0.5, PREFILL_SHARE_DOC, above=0, at_most=1)

    def rebalance(self, cluster: ClusterSnapshot) -> Iterable[MigrationPair]:
        pools = split(cluster, self.prefill_share)
        load = -cluster.columns.num_free_blocks
        yield from drain(cluster, load)
        yield from hand_over(
            cluster,
            sources=pools.prefill,
            destinations=pools.decode,
            load=load,
            reason="prefill done",
        )


def bundle() -> PolicyBundle:
    """Comparison: fixed prefill and decode pools (DistServe)."""
    return PolicyBundle(
        name="distserve",
        dispatch=ShortestPrefillQueue(),
        migration=LeastLoadedDecode(),
        victim=AfterFirstToken(),
        options=HAND_OVER_OPTIONS,
    )
