"""Take turns: the baseline that looks at nothing.

Invariant: of two successive choices the second is the next instance in the order of ids that
accepts work and can hold the request.
"""

from dataclasses import dataclass, field

from llumsched.core.policy import Placement
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.core.types import SchedulingRequest


@dataclass(slots=True, kw_only=True)
class RoundRobin:
    """Send each request to the next instance in turn."""

    _last_id: str = field(default="", init=False)

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        row = cluster.next_row(self._last_id, cluster.candidates(request))
        if row is None:
            return None
        self._last_id = cluster.instance_ids[row]
        return Placement(instance_id=self._last_id, reason="round-robin")

    def state(self) -> str:
        """State for a checkpoint."""
        return self._last_id

    def restore(self, state: str) -> None:
        """Go on from a checkpoint."""
        self._last_id = state
