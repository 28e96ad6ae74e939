"""The instance with the fewest requests: what most load balancers do."""

from dataclasses import dataclass

from llumsched.core.policy import Placement
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.core.types import SchedulingRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastRequests:
    """Send each request to the instance with the fewest running and waiting requests."""

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        num_requests = cluster.columns.num_requests
        row = cluster.argmin(num_requests, cluster.candidates(request))
        if row is None:
            return None
        return Placement(
            instance_id=cluster.instance_ids[row], reason=f"{num_requests.item(row):.0f} requests"
        )
