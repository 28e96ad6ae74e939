"""Upper bounds of output lengths that hold as often as they say, without a model.

Split conformal prediction: the moving quantile of a client is corrected by a quantile of its own
recent errors, taken over all clients, so that the given share of outputs comes out below the bound
whatever the lengths are distributed like, as long as the near future is like the recent past.

Invariants: an error counts only for bounds that were told before the output was seen; memory is
that of `moving_quantile` and `window` errors.
"""

import bisect
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llumsched.core.params import param
from llumsched.core.types import SchedulingRequest
from llumsched.policies.moving_quantile import MovingQuantile


@dataclass(slots=True, kw_only=True)
class CalibratedBound:
    """An upper bound of the output length, below which the given share of requests stays."""

    coverage: float = param(0.9, "Share of outputs that are to stay below.", above=0, at_most=1)
    window: int = param(256, "How many outputs, and errors, are remembered.", at_least=8)
    _quantiles: MovingQuantile = field(init=False)
    _recent: deque[int] = field(default_factory=deque, init=False)
    _errors: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._quantiles = MovingQuantile(quantile=self.coverage, window=self.window)

    def predict(self, request: SchedulingRequest) -> int | None:
        guess = self._quantiles.predict(request)
        return None if guess is None else max(1, guess + self._correction())

    def _correction(self) -> int:
        num = len(self._errors)
        # The finite sample costs one error more.
        rank = math.ceil((num + 1) * self.coverage) - 1
        return self._errors[min(rank, num - 1)] if num else 0

    def observe(self, request: SchedulingRequest, num_output_tokens: int) -> None:
        guess = self._quantiles.predict(request)
        if guess is not None:
            self._add(num_output_tokens - guess)
        self._quantiles.observe(request, num_output_tokens)

    def _add(self, error: int) -> None:
        self._recent.append(error)
        bisect.insort(self._errors, error)
        if len(self._recent) > self.window:
            oldest = self._recent.popleft()
            del self._errors[bisect.bisect_left(self._errors, oldest)]

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"quantiles": self._quantiles.state(), "errors": list(self._recent)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._quantiles.restore(state["quantiles"])
        for error in state["errors"]:
            self._add(error)
