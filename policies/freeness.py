"""Dispatch to the freest instance (Llumnix, OSDI '24, section 4.4).

Invariant: without a length prediction and without `room_first` the choice is the paper's, the
highest freeness as Algorithm 1 defines it. A request of high priority sees it without the headroom,
which is kept for such as itself: else it would avoid the very instances that are kept clear, and in
the end none would be. (Our reading: with it the paper's figures on priorities come out.) With a
prediction an instance also counts part of what its requests are expected to grow by. `room_first`
departs from the paper where freeness misleads: an instance kept clear for a high-priority request
is less free than a full one, so others would queue there while blocks lie idle here; and once all
are full, freeness, which knows the head of a queue only, and a deficit shared by more requests as a
smaller one, may find the longest queue.
"""

from dataclasses import dataclass

import numpy as np

from llumsched.core.params import param
from llumsched.core.policy import Placement
from llumsched.core.snapshot import ClusterSnapshot, FloatColumn
from llumsched.core.types import PriorityClass, SchedulingRequest, Scores


def free_blocks(request: SchedulingRequest, cluster: ClusterSnapshot) -> FloatColumn:
    """Dividend of freeness as this request sees it: a new column, in blocks."""
    c = cluster.columns
    if _is_high(request):
        return c.num_free_blocks - c.head_of_line_blocks
    return c.num_total_blocks - c.virtual_usage


def _is_high(request: SchedulingRequest) -> bool:
    return request.execution_priority >= PriorityClass.HIGH


@dataclass(frozen=True, slots=True, kw_only=True)
class Freeness:
    """Send each request to the freest instance (Llumnix, OSDI '24, section 4.4)."""

    queue: str = param(
        "head_of_line",
        "What waiting requests count for: the paper's head of line, or the whole queue.",
        choices=("head_of_line", "whole"),
    )
    room_first: bool = param(
        True,
        "Prefer an instance with room for the prompt to a freer one where it would wait; if none "
        "has room, take the one with the fewest blocks waiting. The paper's rule is without.",
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
        is_plain = request.predicted_output_tokens is None and not _is_high(request)
        if self.queue == "whole" or not is_plain:
            score = self._extended(request, cluster)
        among = cluster.candidates(request)
        row = cluster.argmax(score, among)
        if row is not None and self.room_first:
            room = cluster.columns.num_room_blocks
            demand = cluster.demand_blocks(request)
            # The freest of all is the freest of those with room, if it has room itself.
            if room[row] < (demand if isinstance(demand, int) else demand[row]):
                has_room = room >= demand if among is None else (room >= demand) & among
                if np.count_nonzero(has_room):
                    row = cluster.argmax(score, has_room)
                else:
                    row = cluster.argmax(room, among)
        if row is None:
            return None
        return Placement(
            instance_id=cluster.instance_ids[row],
            reason=f"freeness={score.item(row):.1f}",
            scores=Scores("freeness", cluster.instance_ids, score.copy()),
        )

    def _extended(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> FloatColumn:
        c = cluster.columns
        free = free_blocks(request, cluster)
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
