"""The less loaded of two random instances (Mitzenmacher, 2001).

Departure from the paper: load is the number of requests, since a queue here is served as a batch.
"""

from dataclasses import dataclass

from llumsched.core.policy import Placement
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.core.types import SchedulingRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerOfTwo:
    """Send each request to the one with fewer requests of two random instances."""

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        among = cluster.candidates(request)
        first = cluster.random_row(among)
        second = cluster.random_row(among)
        if first is None or second is None:
            return None
        num_requests = cluster.columns.num_requests
        row = min(first, second, key=lambda row: (num_requests.item(row), row))
        return Placement(
            instance_id=cluster.instance_ids[row],
            reason=f"{num_requests.item(row):.0f} requests, the fewer of two",
        )
