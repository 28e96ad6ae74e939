"""A random instance: the baseline that balances by chance."""

from dataclasses import dataclass

from llumsched.core.policy import Placement
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.core.types import SchedulingRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomChoice:
    """Send each request to any instance, with equal chances."""

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        row = cluster.random_row(cluster.candidates(request))
        if row is None:
            return None
        return Placement(instance_id=cluster.instance_ids[row], reason="random")
