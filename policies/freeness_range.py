"""Keep the average freeness inside a range (Llumnix, OSDI '24, section 4.4).

Invariant: the freeness averaged is that of a normal-priority request, without the headroom of
others. An instance that boots counts as one at the upper end: help is on its way. How long a wish
must last, and the cool-downs, are the scheduler's.
"""

from dataclasses import dataclass

import numpy as np

from llumsched.core.params import ParamError, check_params, param
from llumsched.core.policy import ScaleDown, ScaleUp
from llumsched.core.snapshot import ClusterSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class FreenessRange:
    """Add an instance below the range; drain the one with the fewest running requests above it."""

    low: float = param(10.0, "Average freeness below which the cluster grows.")
    high: float = param(60.0, "Average freeness above which the cluster shrinks.")

    def __post_init__(self) -> None:
        check_params(self)
        if self.high <= self.low:
            raise ParamError("high", f"high ({self.high:g}) must be above low ({self.low:g})")

    def scale(self, cluster: ClusterSnapshot) -> ScaleUp | ScaleDown | None:
        c = cluster.columns
        rows = np.flatnonzero(c.is_accepting)
        if not len(rows):
            waiting = len(cluster.held())
            return (
                ScaleUp(num_instances=1, reason=f"{waiting} held, none serves") if waiting else None
            )
        free = c.num_free_blocks[rows] - np.where(
            c.num_waiting[rows], c.head_of_line_blocks[rows], 0
        )
        freeness = free / np.maximum(c.batch_size[rows], 1)
        num_booting = cluster.num_booting
        average = float(freeness.sum() + num_booting * self.high) / (len(rows) + num_booting)
        if average < self.low:
            return ScaleUp(num_instances=1, reason=f"average freeness {average:.1f} < {self.low:g}")
        if average > self.high and len(rows) > 1:
            row = rows[np.argmin(c.num_running[rows])]
            return ScaleDown(
                instance_id=cluster.instance_ids[row],
                reason=f"average freeness {average:.1f} > {self.high:g}",
            )
        return None
