"""MemServe (Hu et al., 2024): a global prompt tree over disaggregated instances.

The global scheduler knows, by a tree of prompts per instance, where the longest prefix of a new
prompt is cached, and sends the prefill there. Departures: the tree is the index of prefix blocks
that the engines' KV events feed, exact instead of guessed by past routing with a time to live; and
the caches of the decode side are not sent back to the prefill side.

Invariant: among prefill instances the longest cached prefix always wins, whatever the load.
"""

from dataclasses import dataclass, replace

from llumsched.core.params import param
from llumsched.core.policy import Placement, PolicyBundle
from llumsched.core.snapshot import ClusterSnapshot, Rows
from llumsched.core.types import SchedulingRequest
from llumsched.policies._pools import PREFILL_SHARE_DOC, split
from llumsched.policies.after_first_token import AfterFirstToken
from llumsched.policies.disaggregated import HAND_OVER_OPTIONS
from llumsched.policies.distserve import LeastLoadedDecode
from llumsched.policies.prefix_aware import INDEX_BLOCKS


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalPromptTree:
    """Send each request to the prefill instance that holds the longest prefix of its prompt."""

    prefill_share: float = param(0.5, PREFILL_SHARE_DOC, above=0, at_most=1)

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        pending = cluster.columns.num_prefill_tokens_pending
        among: Rows = split(cluster, self.prefill_share).prefill
        candidates = cluster.candidates(request)
        if candidates is not None:
            among = among & candidates
        reason = "nothing cached"
        for num_blocks, rows in cluster.match_prefix(request):
            holders = rows[among[rows]]
            if len(holders):
                among = holders
                reason = f"{num_blocks} blocks cached"
                break
        row = cluster.argmin(pending, among)
        if row is None:
            return None
        return Placement(
            instance_id=cluster.instance_ids[row],
            reason=f"{reason}, {pending.item(row):.0f} tokens pending",
        )


def bundle() -> PolicyBundle:
    """Comparison: global prompt tree with disaggregated pools (MemServe)."""
    return PolicyBundle(
        name="memserve",
        dispatch=GlobalPromptTree(),
        migration=LeastLoadedDecode(),
        victim=AfterFirstToken(),
        options=replace(HAND_OVER_OPTIONS, prefix_index_blocks=INDEX_BLOCKS),
    )
