"""The simulator beside two real instances on this machine, with and without migration.

Two engines of the model are profiled at the same time (`llumsched profile`), as they will serve:
the cores, their caches and the memory's bandwidth are shared. Then two instances are served, and a
trace is sent to them once for each policy, on the clock; the same trace and policies are simulated
on the hardware file that the profile of the first gave. KV memory is small, so that requests queue
and are preempted.

Each engine computes with one thread, in the profile as in service. Frontend and client share the
cores with them as well; what these take is in the difference that is reported, and so is what an
instance gains while the other has nothing to do. The first requests of each server warm it up and
are not in the trace.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks._replay import replay
from benchmarks._report import Figure, Report, Table, main
from benchmarks._servers import ENGINE_FLAGS, llumsched
from llumsched.config import load
from llumsched.simulator.comparison import number
from llumsched.simulator.hardware import Hardware, load_hardware
from llumsched.simulator.metrics import Distribution, Latencies, latencies
from llumsched.simulator.simulation import SimulationOptions, simulate
from llumsched.simulator.trace import Trace, make_trace
from scripts.prepare_model import prepare_model

BENCHMARK = "The simulator beside real instances"

NUM_INSTANCES = 2
PROFILE_TIMEOUT_S = 900.0
NUM_BLOCKS = 64
MAX_NUM_SEQS = 16
MAX_BATCHED_TOKENS = 512
FLAGS = (
    *ENGINE_FLAGS,
    "--max-model-len",
    # A request of this length must fit into the KV memory.
    "1024",
    "--num-gpu-blocks-override",
    # vLLM keeps a block that no request may have.
    str(NUM_BLOCKS + 1),
    "--max-num-seqs",
    str(MAX_NUM_SEQS),
    "--max-num-batched-tokens",
    str(MAX_BATCHED_TOKENS),
)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
POLICIES = {
    "round_robin": "policy: round_robin\n",
    "infaas": "policy: infaas\n",
    "latency": "policy: latency\n",
}
MEAN_GOAL, P99_GOAL = 10.0, 25.0
_METRICS = ("TTFT", "TPOT", "E2E")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One policy: real and simulated latencies in seconds, by metric."""

    real: dict[str, Distribution]
    simulated: dict[str, Distribution]


def run(quick: bool) -> Report:
    trace = _trace(quick)
    with tempfile.TemporaryDirectory() as folder, _environment(ONE_THREAD):
        hardware = _profiled(Path(folder), seconds=20 if quick else 120)
        pairs = {}
        for salt, (name, text) in enumerate(POLICIES.items()):
            config = Path(folder) / f"{name}.yaml"
            config.write_text(text, encoding="utf-8")
            with llumsched(NUM_INSTANCES, (*FLAGS, "--config", str(config))) as server:
                replay(server, _warm_up(), salt=2 * salt)
                real = replay(server, trace, salt=2 * salt + 1)
            simulated = _simulated(trace, hardware, config)
            pairs[name] = Pair(real=_reduced(real), simulated=_reduced(simulated))
    return Report(figures=_figures(pairs), tables=[_table(pairs)], notes=[_order_note(pairs)])


def _trace(quick: bool) -> Trace:
    """Mixed lengths, arriving for two minutes faster than two small instances can hold."""
    rng = np.random.default_rng(0)
    num_requests = 12 if quick else 150
    return make_trace(
        "mixed",
        arrival_s=np.cumsum(rng.exponential(0.8, num_requests)),
        num_prompt_tokens=rng.choice([32, 64, 200, 600], num_requests, p=[0.4, 0.3, 0.2, 0.1]),
        num_output_tokens=rng.choice([8, 32, 100, 200], num_requests, p=[0.3, 0.4, 0.2, 0.1]),
    )


def _warm_up() -> Trace:
    return make_trace(
        "warm-up",
        arrival_s=np.zeros(8),
        num_prompt_tokens=np.full(8, 200),
        num_output_tokens=np.full(8, 16),
    )


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _profiled(folder: Path, *, seconds: int) -> Hardware:
    """What the first of `NUM_INSTANCES` engines measured while the others did the same."""
    paths = [folder / f"engine-{number}.yaml" for number in range(NUM_INSTANCES)]
    command = [sys.executable, "-m", "llumsched", "profile", prepare_model(), *FLAGS]
    command += ["--accelerator", "this machine", "--seconds", str(seconds)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for path in paths:
            arguments = [*command, "--out", str(path)]
            processes.append(subprocess.Popen(arguments, stdout=sys.stderr))
        for process in processes:
            if process.wait(timeout=PROFILE_TIMEOUT_S):
                raise RuntimeError(f"llumsched profile ended with {process.returncode}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return load_hardware(str(paths[0]))


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
