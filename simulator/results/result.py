"""Result of a simulation: a column a quantity, a row a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llumsched.policy_failures import Failure
from llumsched.simulator.options import SimulationOptions
from llumsched.simulator.results.records import (
    FloatArray,
    InstanceLifetime,
    IntArray,
    MigrationRecord,
    Timeline,
    TokenGaps,
)
from llumsched.simulator.traces.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SimulationResult:
    """Columns of a run. Row `i` is request `i` of the trace; seconds, NaN for never."""

    trace: Trace
    options: SimulationOptions
    policy: str
    dispatched_s: FloatArray
    """First dispatch to an instance."""
    scheduled_s: FloatArray
    """Start of the engine step that first computed a token of it."""
    first_token_s: FloatArray
    finished_s: FloatArray
    num_output_tokens: IntArray
    """Tokens produced; fewer than in the trace if it did not finish, or hit `max_model_len`."""
    token_gaps: TokenGaps
    itl_max_s: FloatArray
    """Longest gap between two tokens, stalls included; NaN with fewer than two tokens."""
    num_cached_tokens: IntArray
    """Prompt tokens that the prefix cache held when the request was first scheduled."""
    num_preemptions: IntArray
    preemption_loss_s: FloatArray
    """From each eviction to the end of the recompute, less one decode step for the token that the
    recompute yields."""
    num_migrations: IntArray
    migration_downtime_s: FloatArray
    """Sum over its migrations of the gap between the last token here and the first there."""
    instance: IntArray
    """Index of the last instance it was on, into `instances`; -1 for none."""
    status: IntArray
    """`RequestStatus` values."""
    instances: tuple[InstanceLifetime, ...]
    migrations: tuple[MigrationRecord, ...]
    timeline: Timeline | None
    makespan_s: float
    """From the first arrival to the last event of any request."""
    end_s: float
    """When the simulation stopped."""
    num_steps: int
    """Engine steps of all instances together."""
    rejections: Mapping[int, str]
    """Row of each rejected request -> why."""
    policy_failures: tuple[Failure, ...]
    """Errors and wrong answers of policies, each kind once; the scheduler decided instead."""
    counters: Mapping[str, int]
    """Actions of the scheduler by type, migrations by outcome, and what else is worth a count."""
    warnings: tuple[str, ...] = ()
    """Doubts about the numbers: fits that were extrapolated, outputs cut short."""
    uses_randomness: bool = True
    """True if the scheduler drew anything; if not, its seed changes nothing."""
    is_complete: bool = True
    """False if `stop` or `until_s` ended it."""
