"""Output lengths by survival: what is left of a request that has produced so many tokens already.

Among the recent outputs of a client, those longer than what the request has produced say how much
is left: their mean excess. That is the hazard rate in the form of its sum, estimated anew as a
request decodes; where lengths have a long tail, what is left grows with what has been produced.

Invariants: memory is bounded by `max_clients` x `window`, the client longest unseen goes first; of
a request that has outlived all that were seen, as much as it has produced is expected yet.
"""

import bisect
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llumsched.core.params import param
from llumsched.core.types import SchedulingRequest


class _Lengths:
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

    def mean_excess(self, produced: int) -> float | None:
        longer = self.ordered[bisect.bisect_right(self.ordered, produced) :]
        return sum(longer) / len(longer) - produced if longer else None


@dataclass(slots=True, kw_only=True)
class HazardRate:
    """The mean excess of a client's last outputs over what a request has produced."""

    window: int = param(128, "How many outputs of a client are remembered.", at_least=1)
    min_samples: int = param(8, "Outputs to see before anything is predicted.", at_least=1)
    max_clients: int = param(4096, "How many clients are remembered.", at_least=1)
    _clients: OrderedDict[str, _Lengths] = field(default_factory=OrderedDict, init=False)
    _everyone: _Lengths = field(default_factory=_Lengths, init=False)

    def predict(self, request: SchedulingRequest) -> int | None:
        left = self.predict_remaining(request, 0)
        return None if left is None else round(left)

    def predict_remaining(self, request: SchedulingRequest, num_output_tokens: int) -> float | None:
        """Output tokens expected yet of a request that has produced so many."""
        is_known = False
        for lengths in (self._clients.get(request.client_id or ""), self._everyone):
            if lengths is not None and len(lengths.ordered) >= self.min_samples:
                is_known = True
                left = lengths.mean_excess(num_output_tokens)
                if left is not None:
                    return self._limited(request, num_output_tokens, left)
        if not is_known:
            return None
        return self._limited(request, num_output_tokens, max(1.0, num_output_tokens))

    def _limited(self, request: SchedulingRequest, produced: int, left: float) -> float:
        if request.max_output_tokens is None:
            return left
        return min(left, max(0.0, request.max_output_tokens - produced))

    def observe(self, request: SchedulingRequest, num_output_tokens: int) -> None:
        self._everyone.add(num_output_tokens, self.window)
        if request.client_id is None:
            return
        lengths = self._clients.setdefault(request.client_id, _Lengths())
        self._clients.move_to_end(request.client_id)
        lengths.add(num_output_tokens, self.window)
        if len(self._clients) > self.max_clients:
            self._clients.popitem(last=False)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "everyone": list(self._everyone.recent),
            "clients": [[name, list(lengths.recent)] for name, lengths in self._clients.items()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        for num_tokens in state["everyone"]:
            self._everyone.add(num_tokens, self.window)
        for name, recent in state["clients"]:
            lengths = self._clients.setdefault(name, _Lengths())
            for num_tokens in recent:
                lengths.add(num_tokens, self.window)
