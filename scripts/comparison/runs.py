"""The traces, clusters and policies that are compared, and the simulation of one of each.

Rates follow from a rule (`sustained_rate_rps`), so that no policy chooses its own. The policies
that predict are told the step times of the hardware, as an operator would tell them; none is told
an output length.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llumsched.config import Config
from llumsched.policies import BUILT_IN
from llumsched.simulator.engines.cost import tokens_s
from llumsched.simulator.hardware.spec import Hardware, load_hardware
from llumsched.simulator.options import SimulationOptions
from llumsched.simulator.results.metrics import Slo, Summary, summarise
from llumsched.simulator.simulation import simulate
from llumsched.simulator.traces.loaders import load_trace

BASELINES = ("round_robin", "random", "power_of_two", "least_requests")
POLICIES = (
    *(name for name, target in BUILT_IN.items() if target.endswith(":bundle")),
    *BASELINES,
)
DELAYS_S = (0.001, 0.01, 0.1, 0.3, 1.0)
# The rate of a trace: this policy keeps this share of the requests within their bounds.
RATED_POLICY = "least_requests"
RATED_SHARE = 0.9
_NUM_HALVINGS = 5
_MAX_RATE_RPS = 128.0
_NICENESS = 10
_FIT_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A trace on a cluster."""

    name: str
    path: str
    hardware: str
    num_instances: int
    num_requests: int
    slo: Slo


WORKLOADS = (
    Workload(
        name="chat",
        path="azure/AzureLLMInferenceTrace_conv.csv",
        hardware="rtx4090-llama-3.1-8b",
        num_instances=8,
        num_requests=4000,
        slo=Slo(ttft_s=2.0, tpot_s=0.1),
    ),
    Workload(
        name="code",
        path="azure/AzureLLMInferenceTrace_code.csv",
        hardware="rtx4090-llama-3.1-8b",
        num_instances=8,
        num_requests=4000,
        slo=Slo(ttft_s=2.0, tpot_s=0.1),
    ),
    Workload(
        name="long context",
        path="mooncake/conversation_trace.jsonl.gz",
        hardware="h100-llama-3.1-8b",
        num_instances=8,
        num_requests=3000,
        slo=Slo(ttft_s=10.0, tpot_s=0.1),
    ),
    Workload(
        name="agents",
        path="mooncake/mooncake_trace_1000.jsonl.gz",
        hardware="h100-llama-3.1-8b",
        num_instances=8,
        num_requests=1000,
        slo=Slo(ttft_s=10.0, tpot_s=0.1),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One simulation to make."""

    workload: Workload
    traces: Path
    policy: str
    rate_rps: float
    seed: int
    report_delay_s: float = 0.001


def simulate_run(run: Run) -> Summary:
    """Simulate it."""
    workload = run.workload
    trace = load_trace(
        run.traces / workload.path,
        rate_rps=run.rate_rps,
        seed=run.seed,
        max_requests=workload.num_requests,
    )
    hardware = load_hardware(workload.hardware)
    options = SimulationOptions(
        hardware=hardware,
        num_instances=workload.num_instances,
        config=Config(policy=run.policy, scheduler=_step_times(hardware)),
        report_delay_s=run.report_delay_s,
        seed=run.seed,
    )
    return summarise(simulate(trace, options), workload.slo)


def sustained_rate_rps(workload: Workload, traces: Path) -> float:
    """The highest rate at which `RATED_POLICY` keeps `RATED_SHARE` of the requests within their
    bounds, to a few percent: above it a better policy has something to gain."""

    def is_sustained(rate_rps: float) -> bool:
        run = Run(workload=workload, traces=traces, policy=RATED_POLICY, rate_rps=rate_rps, seed=0)
        return simulate_run(run).slo_attainment >= RATED_SHARE

    low, high = 0.0, 1.0
    while high < _MAX_RATE_RPS and is_sustained(high):
        low, high = high, 2 * high
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_sustained(middle) else (low, middle)
    return round(low, 2)


def _step_times(hardware: Hardware) -> dict[str, float]:
    """Step times for the policies that predict, as an operator would give them."""
    step = hardware.step
    first = tokens_s(step, 1)
    return {
        "step_base_s": step.host_s + first,
        "step_prefill_token_s": (tokens_s(step, _FIT_TOKENS) - first) / (_FIT_TOKENS - 1),
        "step_running_s": step.request_s,
    }


def simulate_all(runs: Sequence[Run]) -> dict[Run, Summary]:
    """On all cores, giving way to whatever else runs."""
    summaries = {}
    with ProcessPoolExecutor(initializer=os.nice, initargs=(_NICENESS,)) as pool:
        for number, (run, summary) in enumerate(
            zip(runs, pool.map(simulate_run, runs), strict=True), start=1
        ):
            summaries[run] = summary
            print(
                f"[{number}/{len(runs)}] {run.workload.name} {run.policy} seed {run.seed}"
                f" delay {run.report_delay_s:g} s: TTFT P99 {summary.ttft_s.p99:.2f} s",
                flush=True,
            )
    return summaries
