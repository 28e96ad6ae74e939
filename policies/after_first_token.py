"""Which request leaves a prefill instance first: the one whose first token is longest ago.

Invariant: a request whose prefill is still running is never chosen; its prompt would have to be
computed again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llumsched.core.policy import MigrationCandidate


@dataclass(frozen=True, slots=True, kw_only=True)
class AfterFirstToken:
    """Only requests past their first token, most output first."""

    def choose(self, candidates: Sequence[MigrationCandidate]) -> Sequence[MigrationCandidate]:
        return sorted(
            (c for c in candidates if c.num_output_tokens > 0),
            key=lambda c: (-c.num_output_tokens, c.request_id),
        )
