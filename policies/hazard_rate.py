"""Output lengths by survival: what is left of a request that has produced so many tokens already.

Among the recent outputs of a client, those longer than what the request has produced say how much
is left: their mean excess. That is the hazard rate in the form of its sum, estimated anew as a
request decodes; where lengths have a long tail, what is left grows with what has been produced.

Invariant: of a request that has outlived all that were seen, as much as it has produced is expected
yet.
"""

import bisect
from dataclasses import dataclass

from llumsched.core.types import SchedulingRequest
from llumsched.policies.recent_outputs import RecentOutputs


@dataclass(slots=True, kw_only=True)
class HazardRate(RecentOutputs):
    """The mean excess of a client's last outputs over what a request has produced."""

    def predict(self, request: SchedulingRequest) -> int | None:
        left = self.predict_remaining(request, 0)
        return None if left is None else round(left)

    def predict_remaining(self, request: SchedulingRequest, num_output_tokens: int) -> float | None:
        """Output tokens expected yet of a request that has produced so many."""
        left: float | None = None
        for ordered in self.known(request):
            longer = ordered[bisect.bisect_right(ordered, num_output_tokens) :]
            if longer:
                left = sum(longer) / len(longer) - num_output_tokens
                break
            left = max(1.0, num_output_tokens)
        if left is None or request.max_output_tokens is None:
            return left
        return min(left, max(0.0, request.max_output_tokens - num_output_tokens))
