"""The simulator beside two real instances on this machine, with and without migration.

For each policy two instances are served and measured as they serve: steps of many shapes, with
frontend and client on the same cores, and the copying of moves. What is fitted to that is the
hardware file. A trace is then sent to them on the clock, and simulated with the same policy;
nothing is fitted to it.

The trace was chosen, in the simulator and with its seed, for telling the policies apart: bursts of
ten requests, in which long and short prompts alternate, and three in ten answers are long. Whoever
takes turns gives one instance all the long prompts; whoever does not move requests leaves those
with long answers where chance put them. KV memory is small, so that requests queue and are
preempted. The time between two bursts follows from the step that was measured, so that a quicker
machine has as much to do. Such a trace is close to overload, where an error of a step's time comes
back several times as large in the waiting: how large is said below. The first requests of each
server warm it up and are not in the trace.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks._replay import replay
from benchmarks._report import Figure, Report, Table, main
from benchmarks._served_profile import measure_copies, measure_steps
from benchmarks._servers import ENGINE_FLAGS, Server, llumsched
from llumsched.config import load
from llumsched.simulator.comparison import number
from llumsched.simulator.cost import tokens_s
from llumsched.simulator.hardware import Hardware, KvCapacity, MeasuredRange, StepCoefficients
from llumsched.simulator.metrics import Distribution, Latencies, latencies
from llumsched.simulator.simulation import SimulationOptions, simulate
from llumsched.simulator.step_fit import StepFit, fit_steps
from llumsched.simulator.trace import Trace, make_trace

BENCHMARK = "The simulator beside real instances"

NUM_INSTANCES = 2
BLOCK_SIZE = 32
NUM_BLOCKS = 24
MAX_NUM_SEQS = 16
MAX_BATCHED_TOKENS = 512
# SmolLM2-135M in float32: keys and values of 3 heads of 64 in 30 layers.
KV_BYTES_PER_TOKEN = 2 * 3 * 64 * 30 * 4
FLAGS = (
    *ENGINE_FLAGS,
    "--max-model-len",
    # A request of this length must fit into the KV memory.
    str(NUM_BLOCKS * BLOCK_SIZE),
    "--num-gpu-blocks-override",
    # vLLM keeps a block that no request may have.
    str(NUM_BLOCKS + 1),
    "--max-num-seqs",
    str(MAX_NUM_SEQS),
    "--max-num-batched-tokens",
    str(MAX_BATCHED_TOKENS),
)
POLICIES = {
    "round_robin": "policy: round_robin\n",
    "infaas": "policy: infaas\n",
    "latency": "policy: latency\n",
}
STEPS_BETWEEN_BURSTS = 210
TRACE_SEED = 189
MEAN_GOAL, P99_GOAL = 10.0, 25.0
_METRICS = ("TTFT", "TPOT", "E2E")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One policy: real and simulated latencies in seconds, by metric."""

    real: dict[str, Distribution]
    simulated: dict[str, Distribution]


def run(quick: bool) -> Report:
    pairs: dict[str, Pair] = {}
    notes = []
    trace: Trace | None = None
    with tempfile.TemporaryDirectory() as folder:
        for salt, (name, text) in enumerate(POLICIES.items()):
            config = Path(folder) / f"{name}.yaml"
            config.write_text(text, encoding="utf-8")
            with llumsched(NUM_INSTANCES, (*FLAGS, "--config", str(config))) as server:
                replay(server, _warm_up(), salt=2 * salt)
                hardware = _measured(server)
                if trace is None:
                    trace = _trace(hardware, num_bursts=3 if quick else 25)
                real = replay(server, trace, salt=2 * salt + 1)
            simulated = _simulated(trace, hardware, config)
            pairs[name] = Pair(real=_reduced(real), simulated=_reduced(simulated))
            notes.append(
                f"{name}: {_hardware_note(hardware)} {_sensitivity(trace, hardware, config)}"
            )
    return Report(
        figures=_figures(pairs), tables=[_table(pairs)], notes=[_order_note(pairs), *notes]
    )


def _sensitivity(trace: Trace, hardware: Hardware, config: Path) -> str:
    """How far the simulated result goes with an error of the step time."""
    found = []
    for factor in (0.97, 1.03):
        step = hardware.step
        scaled = StepCoefficients(
            table=tuple((tokens, factor * seconds) for tokens, seconds in step.table),
            kv_token_s=factor * step.kv_token_s,
            skew_token_s=factor * step.skew_token_s,
            prefill_pair_s=factor * step.prefill_pair_s,
        )
        simulated = _simulated(trace, replace(hardware, step=scaled), config)
        found.append(number(_reduced(simulated)["TTFT"].mean))
    return (
        f"With steps 3 % shorter or longer the simulated mean TTFT is {found[0]} or {found[1]} s."
    )


def _measured(server: Server) -> Hardware:
    """What instances do that serve like this."""
    steps = asyncio.run(
        measure_steps(
            server,
            num_instances=NUM_INSTANCES,
            num_kv_tokens=NUM_BLOCKS * BLOCK_SIZE,
            num_rounds=1,
        )
    )
    fitted: StepFit = fit_steps(steps)
    return Hardware(
        name="as-served",
        model="SmolLM2-135M-Instruct, float32",
        accelerator="this machine",
        source=f"{len(steps)} steps, seen by clients",
        fit_error=fitted.held_out_error,
        kv=KvCapacity(
            num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, bytes_per_token=KV_BYTES_PER_TOKEN
        ),
        step=fitted.coefficients,
        copy=asyncio.run(measure_copies(server, num_rounds=2)),
        measured=MeasuredRange(
            batch_tokens=MAX_BATCHED_TOKENS,
            requests=MAX_NUM_SEQS,
            kv_tokens=NUM_BLOCKS * BLOCK_SIZE,
        ),
    )


def _trace(hardware: Hardware, *, num_bursts: int) -> Trace:
    """Bursts of ten requests; on a quicker machine they come sooner."""
    rng = np.random.default_rng(TRACE_SEED)
    shape = (num_bursts, 10)
    between_s = STEPS_BETWEEN_BURSTS * tokens_s(hardware.step, 4)
    starts_s = between_s * np.arange(num_bursts)[:, None]
    arrival_s = (starts_s + np.cumsum(rng.exponential(0.02, shape), axis=1)).ravel()
    is_long = rng.random(shape).ravel() < 0.3
    return make_trace(
        "bursts",
        arrival_s=np.sort(arrival_s),
        num_prompt_tokens=np.tile([128, 16], arrival_s.size // 2),
        num_output_tokens=np.where(is_long, 200, 16),
    )


def _warm_up() -> Trace:
    return make_trace(
        "warm-up",
        arrival_s=np.zeros(8),
        num_prompt_tokens=np.full(8, 200),
        num_output_tokens=np.full(8, 16),
    )


def _simulated(trace: Trace, hardware: Hardware, config: Path) -> Latencies:
    options = SimulationOptions(
        hardware=hardware,
        num_instances=NUM_INSTANCES,
        config=load(config),
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        num_kv_blocks=NUM_BLOCKS,
    )
    return latencies(simulate(trace, options))


def _reduced(times: Latencies) -> dict[str, Distribution]:
    columns = (times.ttft_s, times.tpot_s, times.e2e_s)
    return {name: Distribution.of(column) for name, column in zip(_METRICS, columns, strict=True)}


def _figures(pairs: dict[str, Pair]) -> list[Figure]:
    figures = []
    for policy, pair in pairs.items():
        for metric in _METRICS:
            real, simulated = pair.real[metric], pair.simulated[metric]
            for label, ours, theirs, goal in (
                ("mean", simulated.mean, real.mean, MEAN_GOAL),
                ("P99", simulated.p99, real.p99, P99_GOAL),
            ):
                off = 100 * abs(ours / theirs - 1)
                name = f"{policy}: {metric} {label} off by"
                figures.append(Figure(name=name, value=off, unit="%", at_most=goal))
    same = sum(_order(pairs, metric, True) == _order(pairs, metric, False) for metric in _METRICS)
    name = "metrics by whose mean the policies have the same order"
    figures.append(Figure(name=name, value=same, unit="of 3", at_least=3))
    return figures


def _order(pairs: dict[str, Pair], metric: str, is_real: bool) -> list[str]:
    def mean(policy: str) -> float:
        pair = pairs[policy]
        return (pair.real if is_real else pair.simulated)[metric].mean

    return sorted(pairs, key=mean)


def _order_note(pairs: dict[str, Pair]) -> str:
    parts = []
    for metric in _METRICS:
        real, simulated = (", ".join(_order(pairs, metric, is_real)) for is_real in (True, False))
        parts.append(f"by mean {metric}: real {real}; simulated {simulated}")
    return "Best first " + ". ".join(parts) + "."


def _hardware_note(hardware: Hardware) -> str:
    step, copy = hardware.step, hardware.copy
    tokens = ", ".join(f"{1000 * tokens_s(step, n):.3g} ms for {n}" for n in (1, 4, 16, 64, 128))
    return (
        f"Fitted to {hardware.source}, with {100 * hardware.fit_error:.2g} % error on those left"
        f" out. A step by its tokens: {tokens}; each token of context"
        f" {1e6 * step.kv_token_s:.2g} us more. A stage of a move:"
        f" {1000 * copy.base_s:.2g} ms and {1e6 * copy.token_s:.3g} us a token."
    )


def _table(pairs: dict[str, Pair]) -> Table:
    rows: list[Sequence[str | float]] = []
    for policy, pair in pairs.items():
        for metric in _METRICS:
            real, simulated = pair.real[metric], pair.simulated[metric]
            means = f"{number(real.mean)} → {number(simulated.mean)}"
            rows.append((policy, metric, means, f"{number(real.p99)} → {number(simulated.p99)}"))
    return Table(
        title="Real → simulated, seconds", columns=("policy", "", "mean", "P99"), rows=rows
    )


if __name__ == "__main__":
    sys.exit(main(run))
