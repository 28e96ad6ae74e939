"""MAPS (ICML 2026): the shortest queue among instances whose memory suffices to the end.

Each request gets a calibrated upper bound of its output. An instance qualifies if the final sizes,
by these bounds, of all requests there and of the new one fit into its KV cache; of those the one
with the fewest requests waiting, then with the fewest at all, takes it. If none qualifies, the one
with the most cache left by the bounds does. No request moves.

Departures: bounds come from a moving quantile of each client instead of a model that reads the
prompt; requests on an instance are served first come first, not the shortest first, since no order
can be set inside an engine from here. Invariant: while an instance qualifies, none is chosen whose
requests may be evicted, as far as the bounds hold.
"""

from dataclasses import dataclass

import numpy as np

from llumsched.core.params import param
from llumsched.core.policy import Placement, PolicyBundle
from llumsched.core.snapshot import ClusterSnapshot, FloatColumn
from llumsched.core.types import SchedulingRequest
from llumsched.policies.calibrated_bound import CalibratedBound


@dataclass(frozen=True, slots=True, kw_only=True)
class FewestWaitingThatFits:
    """Send each request to the shortest queue among instances with memory for all to the end."""

    assumed_output_tokens: int = param(
        256, "Output assumed of a request without a prediction.", at_least=1
    )

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        c = cluster.columns
        candidates = cluster.candidates(request)
        output = request.predicted_output_tokens or self.assumed_output_tokens
        final = np.ceil((request.num_prompt_tokens + output) / c.block_size)
        left: FloatColumn = c.num_total_blocks - final
        left -= np.maximum(c.predicted_final_blocks, c.num_used_blocks)
        fits = left >= 0
        if candidates is not None:
            fits &= candidates
        # A whole number of those that wait counts first, then a fraction for those that run.
        waiting = c.num_waiting + c.num_requests / 1e6
        row = cluster.argmin(waiting, fits)
        reason = "waiting, memory for all to the end"
        if row is None:
            row = cluster.argmax(left, candidates)
            reason = "waiting, memory for all to the end nowhere"
        if row is None:
            return None
        return Placement(
            instance_id=cluster.instance_ids[row],
            reason=f"{c.num_waiting.item(row):.0f} {reason}; {left.item(row):.0f} blocks left",
        )


def bundle() -> PolicyBundle:
    """Comparison: shortest queue where calibrated bounds of all outputs fit (MAPS)."""
    return PolicyBundle(name="maps", dispatch=FewestWaitingThatFits(), predictor=CalibratedBound())
