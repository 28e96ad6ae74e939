"""The instances of a simulated cluster: made, launched, serving, gone.

Invariant: an instance keeps its index for ever, so records can name it by a number. This module
does not know why instances come and go.
"""

from __future__ import annotations

from llumsched.simulator.engines.base import Engine
from llumsched.simulator.engines.host import EngineHost
from llumsched.simulator.engines.kv_cache import PrefixCache
from llumsched.simulator.engines.machine import Machine, MachineCosts
from llumsched.simulator.engines.vllm_v01 import EngineV01
from llumsched.simulator.engines.vllm_v1 import EngineV1
from llumsched.simulator.kernel import Kernel, to_s
from llumsched.simulator.options import SimulationOptions
from llumsched.simulator.results.records import InstanceLifetime


class Instances:
    """Engine models by index and by id."""

    def __init__(
        self,
        options: SimulationOptions,
        kernel: Kernel,
        host: EngineHost,
        *,
        has_hashes: bool,
        measures_steps: bool,
    ) -> None:
        self._options = options
        self._measures_steps = measures_steps
        self._kernel = kernel
        self._host = host
        hardware = options.hardware
        self._costs = MachineCosts(
            hardware.step, hardware.machine, options.effective_batched_tokens
        )
        self._machine_size = hardware.machine.num_instances if hardware.machine.is_felt else 1
        self._machines: list[Machine] = []
        self._watermark_blocks = int(options.effective_watermark * options.effective_kv_blocks)
        self.block_size = hardware.kv.block_size
        self.max_model_len = self._longest()
        self.has_caches = has_hashes and options.has_prefix_caches
        self.engines: list[Engine] = []
        self.by_id: dict[str, Engine] = {}
        self._launched: list[int] = []
        self._serving: list[int] = []
        self._gone: list[int] = []

    def _longest(self) -> int:
        """Prompt and output that one instance can hold, and so recompute after an eviction."""
        options = self._options
        longest = (options.effective_kv_blocks - self._watermark_blocks) * self.block_size
        if options.engine == "vllm-0.1":
            # Whole prompts only: a recompute has to fit into one batch.
            longest = min(longest, options.effective_batched_tokens)
        return longest if options.max_model_len is None else min(longest, options.max_model_len)

    @property
    def too_long(self) -> str:
        """Why the frontend refuses a prompt that no instance takes."""
        return (
            f"a prompt of {self.max_model_len:,} tokens or more: an instance takes no more than"
            f" {self.max_model_len:,} of prompt and output together (its KV cache, or"
            " max_model_len)"
        )

    def launch(self, now: int) -> Engine:
        """Begin to pay for one more instance; it boots."""
        options = self._options
        index = len(self.engines)
        kind = EngineV1 if options.engine == "vllm-v1" else EngineV01
        costs, costs_copying = self._costs.beside(0, 0)
        engine = kind(
            index=index,
            instance_id=f"instance-{index:04}",
            host=self._host,
            kernel=self._kernel,
            costs=costs,
            costs_copying=costs_copying,
            num_blocks=options.effective_kv_blocks,
            block_size=self.block_size,
            max_num_seqs=options.max_num_seqs,
            max_batched_tokens=options.effective_batched_tokens,
            watermark_blocks=self._watermark_blocks,
            cache=PrefixCache() if self.has_caches else None,
            step_by_step=options.step_by_step,
            measures_steps=self._measures_steps,
        )
        self.engines.append(engine)
        self.by_id[engine.instance_id] = engine
        self._launched.append(now + self._kernel.skipped)
        self._serving.append(-1)
        self._gone.append(-1)
        if self._machine_size > 1:
            self._machine_of(index).add(engine, now)
        return engine

    def _machine_of(self, index: int) -> Machine:
        """Instances fill one machine after another."""
        if index % self._machine_size == 0:
            self._machines.append(Machine(self._kernel, self._costs))
        return self._machines[-1]

    def serve(self, engine: Engine, now: int) -> None:
        """Note that the instance is up."""
        self._serving[engine.index] = now + self._kernel.skipped

    def stop(self, engine: Engine, now: int) -> None:
        """Note that the instance is gone, and not paid for any more."""
        self._gone[engine.index] = now + self._kernel.skipped

    def lifetimes(self) -> tuple[InstanceLifetime, ...]:
        """Records of all instances, by index."""
        return tuple(
            InstanceLifetime(
                instance_id=engine.instance_id,
                launched_s=to_s(launched),
                serving_s=to_s(serving) if serving >= 0 else float("nan"),
                gone_s=to_s(gone) if gone >= 0 else float("nan"),
            )
            for engine, launched, serving, gone in zip(
                self.engines, self._launched, self._serving, self._gone, strict=True
            )
        )
