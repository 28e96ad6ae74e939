"""The options of a simulation: the pool, its engines, and what happens to them.

Invariant: options that exist are consistent; a wrong one is an error that names the fix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llumsched.config import Config, build_bundle
from llumsched.simulator.hardware.spec import Hardware

EngineName = Literal["vllm-v1", "vllm-0.1"]


ENGINES: tuple[EngineName, ...] = ("vllm-v1", "vllm-0.1")


DEFAULT_BATCHED_TOKENS: Mapping[str, int] = {"vllm-v1": 2048, "vllm-0.1": 12_000}


DEFAULT_WATERMARK: Mapping[str, float] = {"vllm-v1": 0.0, "vllm-0.1": 0.01}


class SimulationError(ValueError):
    """A simulation cannot be run as asked; the message names the option and the fix."""


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
        """True if the engines look for prefixes that they hold."""
        return self.enable_prefix_caching and self.engine == "vllm-v1"

    @property
    def effective_kv_blocks(self) -> int:
        """`num_kv_blocks`, or the hardware's."""
        return self.hardware.kv.num_blocks if self.num_kv_blocks is None else self.num_kv_blocks

    @property
    def effective_boot_s(self) -> float:
        """`boot_s`, or the hardware's."""
        return self.hardware.boot_s if self.boot_s is None else self.boot_s
