"""The requests of one instance as a policy sees them: one numpy column per quantity, a row each.

They are made when a policy asks for those of an instance (`ClusterSnapshot.requests_on`), from what
the scheduler has dispatched and what the instance reported of their progress. Reports tell only of
requests whose progress is not what the instance's count of decode steps says, so they stay small.

Invariants: rows are in the order in which the requests came to the instance; a request that no
report has told of yet has produced nothing. This module does not know how an end is predicted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llumsched.core.types import SchedulingRequest

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class RequestProgress(NamedTuple):
    """Progress of one request of an instance."""

    request: SchedulingRequest
    num_computed_tokens: int
    num_output_tokens: int
    is_told: bool
    """A report of this instance told of its progress: it has been in the batch."""
    came_s: float
    """When it was placed there, or arrived by a migration."""
    num_migrations: int
    num_remaining_tokens: float | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestColumns:
    """The requests of one instance; row i of every column is `requests[i]`."""

    requests: tuple[SchedulingRequest, ...]
    """Facts that the scheduler knows: id, prompt, class, client, prefix hashes, deadlines."""
    num_prompt_tokens: Floats
    """Tokens of the prompt."""
    num_output_tokens: Floats
    """Tokens produced so far."""
    num_computed_tokens: Floats
    """Context whose KV is there."""
    num_predicted_tokens: Floats
    """Output that was predicted in all; NaN without a prediction."""
    num_remaining_tokens: Floats
    """Output expected yet, which a predictor that has `predict_remaining` tells anew as a request
    decodes; else what was predicted, less what it has produced; NaN without a prediction."""
    age_s: Floats
    """Seconds since the request arrived at the scheduler."""
    since_placed_s: Floats
    """Seconds since it came to this instance."""
    num_migrations: Floats
    """How often it has moved."""
    is_running: Bools
    """True if KV of it is there; the others wait, or are on their way."""
    is_decoding: Bools
    """True once it has produced a token and its context is computed: only then can it move with
    its KV."""
    ttft_slo_s: Floats
    """Bound on the time to the first token; NaN without one."""
    tpot_slo_s: Floats
    """Bound on the time of each further token; NaN without one."""

    def __len__(self) -> int:
        return len(self.requests)

    @classmethod
    def of(cls, progress: Iterable[RequestProgress], now: float) -> RequestColumns:
        """The columns at time `now`."""
        rows = list(progress)
        requests = tuple(row.request for row in rows)
        outputs = _column(row.num_output_tokens for row in rows)
        computed = _column(row.num_computed_tokens for row in rows)
        prompts = _column(request.num_prompt_tokens for request in requests)
        predicted = _column(r.predicted_output_tokens for r in requests)
        remaining = _column(row.num_remaining_tokens for row in rows)
        is_unknown = np.isnan(remaining)
        remaining[is_unknown] = np.maximum(predicted - outputs, 0.0)[is_unknown]
        is_told = np.fromiter((row.is_told for row in rows), dtype=np.bool_, count=len(rows))
        return cls(
            requests=requests,
            num_prompt_tokens=prompts,
            num_output_tokens=outputs,
            num_computed_tokens=computed,
            num_predicted_tokens=predicted,
            num_remaining_tokens=remaining,
            age_s=now - _column(request.arrival_s for request in requests),
            since_placed_s=now - _column(row.came_s for row in rows),
            num_migrations=_column(row.num_migrations for row in rows),
            is_running=is_told & (computed > 0),
            is_decoding=is_told & (outputs > 0) & (computed >= prompts + outputs - 1),
            ttft_slo_s=_column(request.ttft_slo_s for request in requests),
            tpot_slo_s=_column(request.tpot_slo_s for request in requests),
        )


def _column(values: Iterable[float | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
