"""Figure 10: how long one request stands still, by migrating it alone in a cluster of two.

`MoveOnce` is a policy like any other: it sends the one request from the first instance to the
second after `after_s`. Copying the KV at a stroke and recomputing it take what the hardware file
says.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from llumsched.config import Config, PartConfig
from llumsched.core.policy import MigrationPair
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.simulator.engines.cost import StepCost, copy_ps
from llumsched.simulator.hardware.spec import load_hardware
from llumsched.simulator.kernel import PS_PER_S
from llumsched.simulator.options import SimulationOptions
from llumsched.simulator.simulation import simulate
from llumsched.simulator.traces.trace import make_trace

_OUTPUT_TOKENS = 400
_BATCHED_TOKENS = 12_000
# After the longest prefill, and well before the last token.
_AFTER_S = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveOnce:
    """Move whatever runs on the first instance, while the second is empty and it is late enough."""

    after_s: float = _AFTER_S

    def rebalance(self, cluster: ClusterSnapshot) -> Iterable[MigrationPair]:
        c = cluster.columns
        if cluster.now >= self.after_s and c.num_running[0] and not c.num_requests[1]:
            first, second = cluster.instance_ids
            yield MigrationPair(source=first, destination=second, reason="once", balances=False)


def downtimes_ms(hardware_name: str, context_tokens: int) -> dict[str, float]:
    """Milliseconds that a request stands still, beyond an ordinary decode step, by method."""
    hardware = load_hardware(hardware_name)
    config = Config(
        policy="least_requests",
        parts={"migration": PartConfig(name=f"{__name__}:MoveOnce")},
        scheduler={"migration_settle_s": 1000.0},
    )
    options = SimulationOptions(
        hardware=hardware,
        num_instances=2,
        engine="vllm-0.1",
        config=config,
        max_num_batched_tokens=_BATCHED_TOKENS,
    )
    trace = make_trace(
        "one request",
        arrival_s=np.zeros(1),
        num_prompt_tokens=np.array([context_tokens]),
        num_output_tokens=np.array([_OUTPUT_TOKENS]),
    )
    result = simulate(trace, options)
    (record,) = (m for m in result.migrations if m.outcome == "committed")
    cost = StepCost(hardware.step, _BATCHED_TOKENS)
    step = cost.step(num_prefill_tokens=0, twice_prefill_pairs=0, num_decodes=1,
                     num_kv_tokens=context_tokens)  # fmt: skip
    prefill = cost.step(num_prefill_tokens=context_tokens, twice_prefill_pairs=context_tokens**2,
                        num_decodes=0, num_kv_tokens=0)  # fmt: skip
    return {
        "migration_ms": record.downtime_s * 1e3 - _ms(step),
        "blocking_copy_ms": _ms(copy_ps(hardware.copy, context_tokens)),
        "recompute_ms": _ms(prefill),
    }


def _ms(picoseconds: int) -> float:
    return picoseconds / PS_PER_S * 1e3
