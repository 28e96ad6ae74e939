"""Predict output lengths by a moving quantile per client; no model, no training.

The same observation, that a client's outputs resemble one another, underlies learned predictors,
such as in Llumnix++ of AdaGen (EuroSys '26).

Invariant: nothing is predicted before `min_samples` outputs were seen.
"""

import math
from dataclasses import dataclass

from llumsched.core.params import param
from llumsched.core.types import SchedulingRequest
from llumsched.policies.recent_outputs import RecentOutputs


@dataclass(slots=True, kw_only=True)
class MovingQuantile(RecentOutputs):
    """The chosen quantile of a client's last outputs, or of all clients' while it is new."""

    quantile: float = param(0.7, "Which quantile of the last outputs.", at_least=0, at_most=1)

    def predict(self, request: SchedulingRequest) -> int | None:
        for ordered in self.known(request):
            return ordered[min(len(ordered) - 1, math.floor(self.quantile * len(ordered)))]
        return None
