"""Simulate a trace: the options, the result, and the one function between them.

Invariant: the same trace and options give the same result, bit for bit; nothing reads a clock or
the machine. This module does not know how it is done (`cluster`), nor what the numbers mean
(`metrics`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llumsched.config import Config
from llumsched.plugins import build_bundle
from llumsched.simulator.hardware.spec import Hardware
from llumsched.simulator.results.records import (
    FloatArray,
    InstanceLifetime,
    IntArray,
    MigrationRecord,
    Timeline,
    TokenGaps,
)
from llumsched.simulator.traces.trace import Trace

EngineName = Literal["vllm-v1", "vllm-0.1"]
ENGINES: tuple[EngineName, ...] = ("vllm-v1", "vllm-0.1")

DEFAULT_BATCHED_TOKENS: Mapping[str, int] = {"vllm-v1": 2048, "vllm-0.1": 12_000}
DEFAULT_WATERMARK: Mapping[str, float] = {"vllm-v1": 0.0, "vllm-0.1": 0.01}


class SimulationError(ValueError):
    """A simulation cannot be run as asked; the message names the option and the fix."""


class ExtrapolationWarning(UserWarning):
    """A simulation went beyond what its models cover; `SimulationResult.warnings` says where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationOptions:
    """The cluster to simulate. What is None follows the engine's own default."""

    hardware: Hardware
    num_instances: int
    """Instances that serve from the start."""
    engine: EngineName = "vllm-v1"
    config: Config = field(default_factory=Config)
    """The policy and scheduler options, as `llumsched serve` reads them."""
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    """None: 2,048 for vllm-v1, 12,000 for vllm-0.1."""
    num_kv_blocks: int | None = None
    """None: what the hardware file says."""
    max_model_len: int | None = None
    """Longest prompt and output together; None: what the KV cache of an instance holds."""
    watermark: float | None = None
    """Share of the blocks that admission leaves free. None: 0 for vllm-v1, 0.01 for vllm-0.1."""
    enable_prefix_caching: bool = True
    """vllm-v1 only; without prefix hashes in the trace there is nothing to find."""
    report_interval_s: float = 0.1
    report_delay_s: float = 0.001
    message_delay_s: float = 0.0005
    """Between two instances; a migration's messages take it."""
    boot_s: float | None = None
    """From a launch to serving; None: what the hardware file says."""
    failures: tuple[tuple[int, float], ...] = ()
    """(index of an instance, seconds): it dies without a word."""
    failure_detection_s: float = 1.0
    """From the death of an instance until the scheduler is told."""
    seed: int | None = None
    """Of the scheduler's randomness; None: the configuration's."""
    until_s: float | None = None
    """Stop at this time; None: when every request has ended."""
    step_by_step: bool = False
    """Walk every engine step. Slow; the oracle that the closed form is checked against."""
    record_timeline: bool = False
    decision_log: Path | None = None
    """Folder for a decision log that `llumsched replay` reads."""

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise SimulationError(
                f"unknown engine {self.engine!r}; there are: {', '.join(ENGINES)}"
            )
        if self.num_instances < 0:
            raise SimulationError(f"num_instances={self.num_instances} must be at least 0")
        if not self.num_instances and not build_bundle(self.config).options.max_instances:
            raise SimulationError(
                "num_instances=0; at least 1 is needed unless the scheduler may launch some: set "
                "max_instances, and min_instances to 0, in the configuration"
            )
        if self.report_interval_s <= 0:
            raise SimulationError(f"report_interval_s={self.report_interval_s} must be above 0")
        if self.message_delay_s <= 0:
            raise SimulationError(f"message_delay_s={self.message_delay_s} must be above 0")
        for name in ("report_delay_s", "failure_detection_s"):
            if getattr(self, name) < 0:
                raise SimulationError(f"{name}={getattr(self, name)} must be at least 0")
        if not 0 <= self.effective_watermark < 1:
            raise SimulationError(f"watermark={self.watermark} must be at least 0 and below 1")
        if self.effective_batched_tokens < self.max_num_seqs:
            raise SimulationError(
                f"max_num_batched_tokens={self.effective_batched_tokens} is less than "
                f"max_num_seqs={self.max_num_seqs}; vLLM refuses that: raise the one or lower the "
                "other"
            )
        for index, _ in self.failures:
            if not 0 <= index < self.num_instances:
                raise SimulationError(
                    f"failures names instance {index}; there are 0 to {self.num_instances - 1}"
                )

    @property
    def effective_batched_tokens(self) -> int:
        """`max_num_batched_tokens`, or the engine's default."""
        given = self.max_num_batched_tokens
        return DEFAULT_BATCHED_TOKENS[self.engine] if given is None else given

    @property
    def effective_watermark(self) -> float:
        """`watermark`, or the engine's default."""
        return DEFAULT_WATERMARK[self.engine] if self.watermark is None else self.watermark

    @property
    def has_prefix_caches(self) -> bool:
        """Whether the engines look for prefixes that they hold."""
        return self.enable_prefix_caching and self.engine == "vllm-v1"

    @property
    def effective_kv_blocks(self) -> int:
        """`num_kv_blocks`, or the hardware's."""
        return self.hardware.kv.num_blocks if self.num_kv_blocks is None else self.num_kv_blocks

    @property
    def effective_boot_s(self) -> float:
        """`boot_s`, or the hardware's."""
        return self.hardware.boot_s if self.boot_s is None else self.boot_s


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SimulationResult:
    """What happened. Row `i` of a column is request `i` of the trace; seconds, NaN for never."""

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
    counters: Mapping[str, int]
    """Actions of the scheduler by type, migrations by outcome, and what else is worth a count."""
    warnings: tuple[str, ...] = ()
    """What to know before believing the numbers: fits that were extrapolated, outputs cut short."""
    is_complete: bool = True
    """False if `stop` or `until_s` ended it."""


def simulate(
    trace: Trace,
    options: SimulationOptions,
    *,
    progress: Callable[[int, float], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> SimulationResult:
    """Run a trace through a simulated cluster under the policies of `options.config`.

    Args:
        progress: called now and then with the number of ended requests and the virtual time.
        stop: asked as often; True ends the simulation with what there is.

    Raises:
        SimulationError: the options do not fit the trace.
        PluginError: a policy cannot be found or built.
        ParamError: a parameter of a policy is wrong.
    """
    from llumsched.simulator.cluster.loop import Cluster

    result = Cluster(trace, options).run(progress, stop)
    for warning in result.warnings:
        warnings.warn(warning, ExtrapolationWarning, stacklevel=2)
    return result
