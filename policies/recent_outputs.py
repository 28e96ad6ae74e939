"""The last output lengths of each client: what predictors of lengths remember.

Clients repeat themselves: the last outputs of one say more about its next than any global figure.

Invariants: memory is bounded by `max_clients` x `window`, the client longest unseen goes first;
nothing is said of a client before `min_samples` outputs were seen, of it or of all. This module
does not know what is predicted from the lengths.
"""

import bisect
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llumsched.core.params import param
from llumsched.core.types import SchedulingRequest


class Lengths:
    """The last outputs of one client, in order of time and of size."""

    def __init__(self) -> None:
        self.recent: deque[int] = deque()
        self.ordered: list[int] = []

    def add(self, num_tokens: int, size: int) -> None:
        """Remember one more; of more than `size` the oldest is forgotten."""
        self.recent.append(num_tokens)
        bisect.insort(self.ordered, num_tokens)
        if len(self.recent) > size:
            oldest = self.recent.popleft()
            del self.ordered[bisect.bisect_left(self.ordered, oldest)]


@dataclass(slots=True, kw_only=True)
class RecentOutputs:
    """Lengths by client, and of all clients together."""

    window: int = param(128, "How many outputs of a client are remembered.", at_least=1)
    min_samples: int = param(8, "Outputs to see before anything is predicted.", at_least=1)
    max_clients: int = param(4096, "How many clients are remembered.", at_least=1)
    _clients: OrderedDict[str, Lengths] = field(default_factory=OrderedDict, init=False)
    _everyone: Lengths = field(default_factory=Lengths, init=False)

    def known(self, request: SchedulingRequest) -> Iterator[list[int]]:
        """Enough lengths to predict from, in ascending order: of the client, then of all."""
        for lengths in (self._clients.get(request.client_id or ""), self._everyone):
            if lengths is not None and len(lengths.ordered) >= self.min_samples:
                yield lengths.ordered

    def observe(self, request: SchedulingRequest, num_output_tokens: int) -> None:
        """Remember how long an output became."""
        self._everyone.add(num_output_tokens, self.window)
        if request.client_id is None:
            return
        lengths = self._clients.setdefault(request.client_id, Lengths())
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
            lengths = self._clients.setdefault(name, Lengths())
            for num_tokens in recent:
                lengths.add(num_tokens, self.window)
