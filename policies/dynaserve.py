"""DynaServe (arXiv 2504.09285): a request may be split at a token between two instances.

A request is one or two parts: prompt and the first tokens of its output on one instance, the rest
on another. Each is placed where its first token comes earliest; if another instance is by far
emptier, a hand-over to it is planned there and then.

Departures: a request is split in its output only, not in the middle of the prompt, since what moves
is a request that decodes; the token is not searched for with a model of both instances, but half
of the predicted output, and less the fuller the first one is; the length is the mean excess of its
client's outputs. Invariant: at most one hand-over a request is planned, and never onto the instance
where it begins.
"""

from dataclasses import dataclass

import numpy as np

from llumsched.core.options import SchedulerOptions
from llumsched.core.params import param
from llumsched.core.policy import MigrationPair, Placement, PolicyBundle
from llumsched.core.snapshot import ClusterSnapshot, FloatColumn
from llumsched.core.types import SchedulingRequest
from llumsched.policies._pools import drain
from llumsched.policies.hazard_rate import HazardRate
from llumsched.policies.low_priority_short import LowPriorityShort


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitAtToken:
    """Place a request where its prompt ends first, and plan to hand over the rest of its output."""

    min_tokens: int = param(
        64, "Output tokens that a part has at least: a shorter one is not worth a move.", at_least=1
    )
    min_imbalance: float = param(
        0.1, "Difference in KV cache use of the two from which a request is split.", at_least=0
    )

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        c = cluster.columns
        candidates = cluster.candidates(request)
        ends_s: FloatColumn = np.maximum(c.prefill_ends_s, cluster.now)
        ends_s = ends_s + c.prefill_token_s * request.num_prompt_tokens + c.decode_step_s
        has_room = c.num_room_blocks >= cluster.demand_blocks(request)
        if candidates is not None:
            has_room &= candidates
        row = cluster.argmin(ends_s, has_room)
        if row is None:
            row = cluster.argmax(c.num_room_blocks, candidates)
        if row is None:
            return None
        instance_id = cluster.instance_ids[row]
        first_s = ends_s.item(row) - cluster.now
        split = self._split(request, cluster, row)
        if split is None:
            return Placement(
                instance_id=instance_id, reason=f"whole, first token in {first_s:.2f} s"
            )
        other, num_tokens = split
        other_id = cluster.instance_ids[other]
        return Placement(
            instance_id=instance_id,
            reason=f"first token in {first_s:.2f} s, to {other_id} after {num_tokens} tokens",
            hand_over_to=other_id,
            after_output_tokens=num_tokens,
        )

    def _split(
        self, request: SchedulingRequest, cluster: ClusterSnapshot, row: int
    ) -> tuple[int, int] | None:
        """Where the second part is to go, and after how many tokens; None if it is not split."""
        predicted = request.predicted_output_tokens
        if predicted is None or predicted < 2 * self.min_tokens or len(cluster) < 2:
            return None
        c = cluster.columns
        usage = (c.num_used_blocks + c.num_waiting_blocks) / c.num_total_blocks
        others = c.is_accepting.copy()
        others[row] = False
        other = cluster.argmin(usage, others)
        if other is None:
            return None
        more = usage.item(row) - usage.item(other)
        if more < self.min_imbalance:
            return None
        # The fuller its first instance, the earlier it leaves.
        num_tokens = round(predicted * 0.5 * (1.0 - min(1.0, more)))
        return other, min(max(num_tokens, self.min_tokens), predicted - self.min_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedOnly:
    """Propose nothing but what empties an instance that drains; hand-overs are planned before."""

    def rebalance(self, cluster: ClusterSnapshot) -> list[MigrationPair]:
        return list(drain(cluster, cluster.columns.num_used_blocks))


def bundle() -> PolicyBundle:
    """Comparison: requests split at a token between two instances, planned ahead (DynaServe)."""
    return PolicyBundle(
        name="dynaserve",
        dispatch=SplitAtToken(),
        migration=PlannedOnly(),
        victim=LowPriorityShort(),
        predictor=HazardRate(),
        options=SchedulerOptions(
            follow_requests=True, migration_interval_s=0.2, migration_settle_s=1.0
        ),
    )
