"""Records of a simulation: requests, migrations and instances, and a time line.

Invariant: a value here is what happened in virtual time, in seconds from the start of the trace's
clock; NaN says that it never happened. This module does not know what is good or bad (`metrics`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class RequestStatus(IntEnum):
    """How a request stood when the simulation ended."""

    UNFINISHED = 0
    """Queued or running, or not arrived yet."""
    FINISHED = 1
    REJECTED = 2
    """Answered with an error: by the scheduler, or for a prompt no engine takes."""
    LOST = 3
    """Nobody has it: neither the scheduler nor an instance knows it, and it never ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationRecord:
    """One migration that had chosen its request."""

    migration_id: str
    request: int
    """Row of the trace."""
    source: str
    destination: str
    start_s: float
    end_s: float
    num_stages: int
    num_blocks: int
    """Blocks that were copied; fewer than the request holds where some were cached."""
    downtime_s: float
    """From the last token at the source to the first at the destination; NaN if it did not move."""
    outcome: str
    """`committed`, or why it did not move."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceLifetime:
    """When an instance was paid for, and when it served."""

    instance_id: str
    launched_s: float
    serving_s: float
    """NaN if it never came up."""
    gone_s: float
    """NaN if it was there at the end."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenGaps:
    """Every gap between two tokens of a request, in runs of engine steps of one batch.

    Step `i` of a run, from 0, gave `num_tokens` requests a token, each `first_s + i * growth_s`
    after its last one.
    """

    first_s: FloatArray
    growth_s: FloatArray
    num_steps: IntArray
    num_tokens: IntArray

    def weighted(self) -> tuple[FloatArray, IntArray]:
        """Each step's gap, and how many requests had it."""
        starts = np.cumsum(self.num_steps) - self.num_steps
        index = np.arange(int(self.num_steps.sum())) - np.repeat(starts, self.num_steps)
        first_s, growth_s = (np.repeat(x, self.num_steps) for x in (self.first_s, self.growth_s))
        return first_s + growth_s * index, np.repeat(self.num_tokens, self.num_steps)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Timeline:
    """Samples of instances, in the order of time; one row a sample, taken at every load report."""

    time_s: FloatArray
    instance: IntArray
    """Index into the lifetimes of the result."""
    num_used_blocks: IntArray
    """Without the reserved ones."""
    num_reserved_blocks: IntArray
    num_free_blocks: IntArray
    num_running: IntArray
    num_waiting: IntArray
