"""The simulator beside two real instances on this machine, with and without migration.

For each policy two instances are served, and a trace is sent to them on the clock. Before and after
it the first pair is measured as it serves: steps of many shapes, with frontend and client on the
same cores, and the copying of moves. One hardware file is fitted to all that was measured, and
nothing to the trace, which is simulated with the same policies. No two pairs of instances, and no
two minutes of a shared machine, are equally fast: the step of one request alone is measured on each
pair just before and after its trace, and all its steps are scaled by that.

A step takes longer while the other instance computes too, most of all when both only decode: two
engines read their weights from the same memory, and a frontend and a client take time of the same
cores. By how much is measured as well (the same batches and prompts beside an idle and a busy
instance), and is in the hardware file (`machine`). Between instances that have an accelerator each
there is nothing of the kind.

The trace has bursts of two kinds in turn. In one every second answer is long, which nobody can
know; in the other every second prompt is long, and whoever takes turns gives one instance all of
them. Two requests that come first and stay keep both instances computing, so that what a policy
gains by balance is not lost to the machine that they share. The time between bursts follows from
the step that was measured, so that a quicker machine has as much to do. Policies and trace were
chosen in the simulator, so that the policies differ by more than the step that was measured is
wrong; that they do so in reality is what is tested. The first requests of each server warm it up
and are not in the trace.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks._replay import replay
from benchmarks._report import Figure, Report, Table, main
from benchmarks._served_profile import (
    SLOWDOWNS,
    measure_copies,
    measure_pace,
    measure_sharing,
    measure_steps,
    undisturbed,
)
from benchmarks._servers import ENGINE_FLAGS, Server, llumsched
from llumsched.config import load
from llumsched.core.step_time import MeasuredStep
from llumsched.simulator.engines.cost import tokens_s
from llumsched.simulator.hardware.spec import (
    CopyCoefficients,
    Hardware,
    KvCapacity,
    MachineSharing,
    MeasuredRange,
    StepCoefficients,
)
from llumsched.simulator.hardware.step_fit import fit_steps
from llumsched.simulator.options import SimulationOptions
from llumsched.simulator.results.comparison import number
from llumsched.simulator.results.metrics import Distribution, Latencies, latencies
from llumsched.simulator.simulation import simulate
from llumsched.simulator.traces.trace import Trace, make_trace

BENCHMARK = "The simulator beside real instances"

NUM_INSTANCES = 2
BLOCK_SIZE = 32
NUM_BLOCKS = 32
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
TAKES_TURNS = "round_robin"
POLICIES = {
    # The first is the one that takes turns, as what measures steps asks for.
    "round_robin": "policy: round_robin\n",
    "throughput": "policy: throughput\n",
    "latency": "policy: latency\n",
}
STEPS_BETWEEN_BURSTS = 300
# Of the two requests of each burst that are there from its beginning nearly to its end.
LONGEST_ANSWER = 255
MEAN_GOAL, P99_GOAL = 10.0, 25.0
_METRICS = ("TTFT", "TPOT", "E2E")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One policy: real and simulated latencies in seconds, by metric."""

    real: dict[str, Distribution]
    simulated: dict[str, Distribution]


def run(quick: bool) -> Report:
    steps: list[MeasuredStep] = []
    copies: list[CopyCoefficients] = []
    machine = MachineSharing()
    trace: Trace | None = None

    def measure(server: Server, *, every: int) -> None:
        steps.extend(_measured_steps(server, every=every))
        copies.append(asyncio.run(measure_copies(server, num_rounds=2)))

    with tempfile.TemporaryDirectory() as folder:
        configs = {name: Path(folder) / f"{name}.yaml" for name in POLICIES}
        replayed, pace_s = {}, {}
        for salt, (name, config) in enumerate(configs.items()):
            config.write_text(POLICIES[name], encoding="utf-8")
            with llumsched(NUM_INSTANCES, (*FLAGS, "--config", str(config))) as server:
                replay(server, _warm_up(), salt=2 * salt)
                if trace is None:
                    machine = asyncio.run(measure_sharing(server, num_rounds=1 if quick else 3))
                    measure(server, every=3 if quick else 1)
                    trace = _trace(fit_steps(steps).coefficients, num_bursts=2 if quick else 12)
                before_s = _pace(server)
                replayed[name] = replay(server, trace, salt=2 * salt + 1)
                pace_s[name] = (before_s + _pace(server)) / 2
                if name == TAKES_TURNS and not quick:
                    measure(server, every=1)
        assert trace is not None
        measured = _hardware(steps, copies, machine)
        hardware = {
            name: _at_pace(measured, pace_s[name] / pace_s[TAKES_TURNS]) for name in configs
        }
        pairs = {
            name: Pair(
                real=_reduced(replayed[name]),
                simulated=_reduced(_simulated(trace, hardware[name], config)),
            )
            for name, config in configs.items()
        }
        notes = [_order_note(pairs), _hardware_note(measured), _pace_note(pace_s)]
        notes += [
            _sensitivity(name, trace, hardware[name], config) for name, config in configs.items()
        ]
    return Report(figures=_figures(pairs), tables=[_table(pairs)], notes=notes)


def _sensitivity(name: str, trace: Trace, hardware: Hardware, config: Path) -> str:
    """How far the simulated result goes with an error of the step time."""
    found = []
    for factor in (0.97, 1.03):
        simulated = _simulated(trace, _at_pace(hardware, factor), config)
        found.append(number(_reduced(simulated)["TTFT"].mean))
    return (
        f"With steps 3 % shorter or longer the simulated mean TTFT of {name} is {found[0]} or"
        f" {found[1]} s."
    )


def _pace(server: Server) -> float:
    return asyncio.run(measure_pace(server, num_rounds=12))


def _at_pace(hardware: Hardware, factor: float) -> Hardware:
    """With steps so many times as long."""
    step = hardware.step
    scaled = StepCoefficients(
        table=tuple((tokens, factor * seconds) for tokens, seconds in step.table),
        kv_token_s=factor * step.kv_token_s,
        skew_token_s=factor * step.skew_token_s,
        prefill_pair_s=factor * step.prefill_pair_s,
    )
    return dataclasses.replace(hardware, step=scaled)


def _measured_steps(server: Server, *, every: int) -> list[MeasuredStep]:
    """Steps measured on instances that serve this configuration."""
    return asyncio.run(
        measure_steps(
            server,
            num_instances=NUM_INSTANCES,
            num_kv_tokens=NUM_BLOCKS * BLOCK_SIZE,
            every=every,
        )
    )


def _hardware(
    steps: Sequence[MeasuredStep], copies: Sequence[CopyCoefficients], machine: MachineSharing
) -> Hardware:
    """Of steps that were measured while both instances did the same."""
    fitted = fit_steps([undisturbed(step, machine) for step in steps])
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
        copy=CopyCoefficients(
            base_s=statistics.median(copy.base_s for copy in copies),
            token_s=statistics.median(copy.token_s for copy in copies),
        ),
        measured=MeasuredRange(
            batch_tokens=MAX_BATCHED_TOKENS,
            requests=MAX_NUM_SEQS,
            kv_tokens=NUM_BLOCKS * BLOCK_SIZE,
        ),
        machine=machine,
    )


def _trace(step: StepCoefficients, *, num_bursts: int) -> Trace:
    """Bursts, by turns of answers and of prompts that differ; on a quicker machine sooner."""
    rng = np.random.default_rng(0)
    step_s = tokens_s(step, 4)
    rows: list[tuple[float, int, int]] = []
    for burst in range(num_bursts):
        begin_s = burst * STEPS_BETWEEN_BURSTS * step_s
        rows += [(begin_s, 16, LONGEST_ANSWER), (begin_s + 0.03, 16, LONGEST_ANSWER)]
        begin_s += 4 * step_s
        unlike_answers = burst % 2 == 0
        for i in range(8 if unlike_answers else 16):
            at_s = begin_s + 0.03 * i + rng.exponential(0.0075)
            if unlike_answers:
                rows.append((at_s, 32, 150 if i % 2 else 8))
            else:
                rows.append((at_s, 16 if i % 2 else 448, 40))
    arrival_s, num_prompt_tokens, num_output_tokens = zip(*sorted(rows), strict=True)
    return make_trace(
        "bursts",
        arrival_s=arrival_s,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
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
    step, copy, machine = hardware.step, hardware.copy, hardware.machine
    slowdowns = ", ".join(
        f"{name.replace('_', ' ')} {100 * getattr(machine, name):.3g} %" for name in SLOWDOWNS
    )
    tokens = ", ".join(f"{1000 * tokens_s(step, n):.3g} ms for {n}" for n in (1, 4, 16, 64, 128))
    return (
        f"Fitted to {hardware.source}, with {100 * hardware.fit_error:.2g} % error on those left"
        f" out. A step by its tokens, with the other instance idle: {tokens}; each token of context"
        f" {1e6 * step.kv_token_s:.2g} us more. Longer beside a busy instance: {slowdowns}."
        f" A stage of a move:"
        f" {1000 * copy.base_s:.2g} ms and {1e6 * copy.token_s:.3g} us a token."
    )


def _pace_note(pace_s: dict[str, float]) -> str:
    told = ", ".join(f"{1000 * seconds:.3g} ms with {name}" for name, seconds in pace_s.items())
    return (
        f"A step of one request alone, before and after the trace: {told}. Each policy"
        " is simulated with steps that are longer or shorter in proportion."
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
