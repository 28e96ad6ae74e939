"""Keep the average freeness inside a range (Llumnix, OSDI '24, section 4.4).

Invariant: the average is over requests: the blocks that all instances have free, less what waits
for them there or at the scheduler, by the requests of all. (A mean of the instances' own freeness
would be little more than that of an empty one: whichever has just booted would be drained at once.)
It is that of a normal-priority request, without the headroom of others; an instance that boots
counts with all its blocks, as help is on its way. An instance that is the last and idle is not
needed, whatever its freeness. How long a wish must last, the cool-downs, and how many must stay are
the scheduler's.
"""

import math
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
        if len(rows) == 1 and not c.num_requests.any() and not cluster.held():
            return ScaleDown(instance_id=cluster.instance_ids[rows[0]], reason="nothing runs")
        # An instance with nothing on it, as those that boot will be.
        num_blocks = float(c.num_total_blocks[rows].mean())
        free = float((c.num_free_blocks[rows] - c.num_waiting_blocks[rows]).sum())
        free += cluster.num_booting * num_blocks
        held = cluster.held()
        block_size = float(c.block_size[rows].mean())
        free -= sum(request.num_prompt_tokens for request in held) / block_size
        num_requests = max(1.0, float(c.num_requests[rows].sum()) + len(held))
        average = free / num_requests
        if average < self.low:
            num_missing = math.ceil((self.low * num_requests - free) / num_blocks)
            return ScaleUp(
                num_instances=max(1, num_missing),
                reason=f"average freeness {average:.1f} < {self.low:g}",
            )
        if average > self.high and len(rows) > 1:
            row = rows[np.argmin(c.num_running[rows])]
            return ScaleDown(
                instance_id=cluster.instance_ids[row],
                reason=f"average freeness {average:.1f} > {self.high:g}",
            )
        return None
