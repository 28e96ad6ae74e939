"""Which request a source moves first (Llumnix, OSDI '24, section 4.4).

Invariant: without length predictions the order is the paper's: low priority first, then short
first, because a short request is quick to copy. With them, a request about to end goes last: its
copy would be wasted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from llumsched.core.params import param
from llumsched.core.policy import MigrationCandidate


@dataclass(frozen=True, slots=True, kw_only=True)
class LowPriorityShort:
    """Low execution priority first, then the fewest blocks."""

    first_by: ClassVar[tuple[str, ...]] = ("execution_priority", "num_blocks")

    min_remaining_tokens: int = param(
        64,
        "A request predicted to end within this many tokens moves last; "
        "without a length predictor it has no effect.",
        at_least=0,
    )

    def choose(self, candidates: Sequence[MigrationCandidate]) -> Sequence[MigrationCandidate]:
        return sorted(
            candidates,
            key=lambda c: (c.execution_priority, self._ends_soon(c), c.num_blocks, c.request_id),
        )

    def _ends_soon(self, candidate: MigrationCandidate) -> bool:
        predicted = candidate.predicted_output_tokens
        return (
            predicted is not None
            and 0 <= predicted - candidate.num_output_tokens < self.min_remaining_tokens
        )
