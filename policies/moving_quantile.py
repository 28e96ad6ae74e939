"""Predict output lengths by a moving quantile per client; no model, no training.

Clients repeat themselves: the last outputs of one say more about its next than any global figure
(the same observation underlies learned predictors, such as in Llumnix++ of AdaGen, EuroSys '26).

Invariants: memory is bounded by `max_clients` x `window`, the client longest unseen goes first;
nothing is predicted before `min_samples` outputs were seen.
"""

import bisect
import math
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llumsched.core.params import param
from llumsched.core.types import SchedulingRequest


class _Window:
    """The last outputs of one client, in order of time and of size."""

    def __init__(self) -> None:
        self.recent: deque[int] = deque()
        self.ordered: list[int] = []

    def add(self, num_tokens: int, size: int) -> None:
        self.recent.append(num_tokens)
        bisect.insort(self.ordered, num_tokens)
        if len(self.recent) > size:
            oldest = self.recent.popleft()
            del self.ordered[bisect.bisect_left(self.ordered, oldest)]

    def quantile(self, q: float) -> int:
        return self.ordered[min(len(self.ordered) - 1, math.floor(q * len(self.ordered)))]


@dataclass(slots=True, kw_only=True)
class MovingQuantile:
    """The chosen quantile of a client's last outputs, or of all clients' while it is new."""

    quantile: float = param(0.7, "Which quantile of the last outputs.", at_least=0, at_most=1)
    window: int = param(128, "How many outputs of a client are remembered.", at_least=1)
    min_samples: int = param(8, "Outputs to see before anything is predicted.", at_least=1)
    max_clients: int = param(4096, "How many clients are remembered.", at_least=1)
    _clients: OrderedDict[str, _Window] = field(default_factory=OrderedDict, init=False)
    _everyone: _Window = field(default_factory=_Window, init=False)

    def predict(self, request: SchedulingRequest) -> int | None:
        for window in (self._clients.get(request.client_id or ""), self._everyone):
            if window is not None and len(window.ordered) >= self.min_samples:
                return window.quantile(self.quantile)
        return None

    def observe(self, request: SchedulingRequest, num_output_tokens: int) -> None:
        self._everyone.add(num_output_tokens, self.window)
        if request.client_id is None:
            return
        window = self._clients.setdefault(request.client_id, _Window())
        self._clients.move_to_end(request.client_id)
        window.add(num_output_tokens, self.window)
        if len(self._clients) > self.max_clients:
            self._clients.popitem(last=False)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "everyone": list(self._everyone.recent),
            "clients": [[name, list(w.recent)] for name, w in self._clients.items()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        for num_tokens in state["everyone"]:
            self._everyone.add(num_tokens, self.window)
        for name, recent in state["clients"]:
            window = self._clients.setdefault(name, _Window())
            for num_tokens in recent:
                window.add(num_tokens, self.window)
