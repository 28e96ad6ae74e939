"""Dispatch to the freest instance (Llumnix, OSDI '24, section 4.4).

Invariant: without a length prediction the choice is the paper's, the highest freeness as
Algorithm 1 defines it. With one, an instance also counts part of what its requests are expected to
grow by, which the paper does not do.
"""

from dataclasses import dataclass

import numpy as np

from llumsched.core.params import param
from llumsched.core.policy import Placement
from llumsched.core.snapshot import ClusterSnapshot, FloatColumn
from llumsched.core.types import SchedulingRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Freeness:
    """Send each request to the freest instance (Llumnix, OSDI '24, section 4.4)."""

    queue: str = param(
        "head_of_line",
        "What waiting requests count for: the paper's head of line, or the whole queue.",
        choices=("head_of_line", "whole"),
    )
    growth_weight: float = param(
        0.5,
        "Share of the predicted growth of running requests that counts as used; "
        "without a length predictor there is none.",
        at_least=0,
        at_most=1,
    )

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        score = cluster.columns.freeness
        if self.queue == "whole" or request.predicted_output_tokens is not None:
            score = self._extended(request, cluster)
        row = cluster.argmax(score, cluster.candidates(request))
        if row is None:
            return None
        return Placement(
            instance_id=cluster.instance_ids[row], reason=f"freeness={score.item(row):.1f}"
        )

    def _extended(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> FloatColumn:
        c = cluster.columns
        free = c.num_total_blocks - c.virtual_usage
        batch_size = c.batch_size
        if self.queue == "whole":
            free -= c.num_waiting_blocks - c.head_of_line_blocks
            batch_size = c.num_requests
        if request.predicted_output_tokens is not None:
            growth = np.maximum(c.predicted_final_blocks - c.num_used_blocks, 0)
            free -= self.growth_weight * growth
        # An empty instance has all its blocks for a batch of one: no other has more.
        free /= np.maximum(batch_size, 1)
        return free
