"""Fair turns between clients: start-time fair queueing, with service counted in tokens.

A request's tag is when its service would start if every client had an equal share of one server:
the virtual time, or the end of what its client has asked for already. Held requests of a class go
by their tags, so a client that floods the queue waits behind its own requests, not others before
it. Goyal, Vin and Cheng, SIGCOMM '96; that service is counted in tokens, an output token worth two
of the prompt, is the virtual token counter of Sheng et al., OSDI '24.

Output lengths are unknown when a request is tagged: the prompt is charged then, the output when it
ends, so it delays the client's next requests and not this one.

Invariants: tags of one client never decrease; the virtual time never decreases; a client that asks
for nothing saves up nothing. This module does not know classes, instances, or who holds a request.
"""

from collections.abc import Mapping
from typing import Any

PROMPT_TOKEN_WEIGHT = 1.0
OUTPUT_TOKEN_WEIGHT = 2.0
_MIN_REMEMBERED = 1024


class FairTurns:
    """Weighted tokens that each client has been charged; ``None`` is a client as well."""

    def __init__(self) -> None:
        self._virtual_time = 0.0
        self._charged_until: dict[str | None, float] = {}
        self._forget_at = _MIN_REMEMBERED

    def tag(self, client_id: str | None, num_prompt_tokens: int) -> float:
        """The tag of a client's next request, which is charged its prompt."""
        start = self._until(client_id)
        self._charge(client_id, num_prompt_tokens * PROMPT_TOKEN_WEIGHT)
        return start

    def began(self, tag: float) -> None:
        """A request with this tag was dispatched: the virtual time comes to it."""
        self._virtual_time = max(self._virtual_time, tag)

    def ended(self, client_id: str | None, num_output_tokens: int) -> None:
        """Charge a client the output of a request that has ended."""
        self._charge(client_id, num_output_tokens * OUTPUT_TOKEN_WEIGHT)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "virtual_time": self._virtual_time,
            "charged_until": [[c, until] for c, until in self._charged_until.items()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._virtual_time = state["virtual_time"]
        self._charged_until = dict(state["charged_until"])

    def _until(self, client_id: str | None) -> float:
        return max(self._virtual_time, self._charged_until.get(client_id, 0.0))

    def _charge(self, client_id: str | None, weight: float) -> None:
        self._charged_until[client_id] = self._until(client_id) + weight
        if len(self._charged_until) > self._forget_at:
            # One who is not ahead of the virtual time is as good as new.
            now = self._virtual_time
            self._charged_until = {
                c: until for c, until in self._charged_until.items() if until > now
            }
            self._forget_at = max(_MIN_REMEMBERED, 2 * len(self._charged_until))
