"""One simulation of a policy on a workload, and the rate at which a workload is offered.

Rates follow from a rule (`sustained_rate_rps`), so that no policy chooses its own. Policies that
predict and do not learn are given the step times of the hardware, as an operator would give them;
`adaptive` learns its own. None is given an output length.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llumsched.config import Config
from llumsched.simulator.engines.cost import tokens_s
from llumsched.simulator.hardware.spec import Hardware, load_hardware
from llumsched.simulator.options import SimulationOptions
from llumsched.simulator.results.metrics import Summary, summarise
from llumsched.simulator.simulation import simulate
from scripts.comparison.kept import Kept
from scripts.comparison.workloads import Workload, shortened

POLICIES = (
    "adaptive",
    "late_binding",
    "llumnix",
    "star",
    "dynaserve",
    "dualmap",
    "dynamo",
    "llm_d",
    "maps",
    "infaas",
    "least_requests",
)
"""The default, the others that move requests, and routers that do not."""
STATIONARY = ("dynamo", "llm_d", "maps", "infaas", "least_requests")
LARGER_POLICIES = ("adaptive", "late_binding", "llumnix", "star", "dynamo", "llm_d")
"""Policies that larger pools are simulated with."""
DELAYS_S = (0.001, 0.01, 0.1, 0.3, 1.0)
# Capacity: the rate at which this policy keeps this share of the requests within their bounds.
RATED_POLICY = "least_requests"
RATED_SHARE = 0.9
RATED_SEEDS = (1, 2)
RATED_INSTANCES = 8
RATED_LENGTH = 2
"""Capacity is found with this many times as many requests, so that it is not a start-up's."""
_NUM_HALVINGS = 4
_MAX_RATE_RPS = 256.0
_NICENESS = 5
_FIT_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One simulation to make."""

    workload: Workload
    traces: Path
    policy: str
    capacity_rps: float
    """Of `RATED_INSTANCES`."""
    load: float = 1.0
    """Share of the capacity that is offered."""
    num_instances: int = RATED_INSTANCES
    seed: int
    report_delay_s: float = 0.001

    @property
    def words(self) -> str:
        """All that tells it from another."""
        return (
            f"{self.workload.name} {self.workload.num_requests} {self.policy} {self.capacity_rps}"
            f" {self.load} {self.num_instances} {self.seed} {self.report_delay_s}"
        )


def simulate_run(run: Run, folder: Path | None = None) -> Summary:
    """Simulate it, unless its result is kept in the folder."""
    return Kept(folder).get(run.words, lambda: _simulated(run))


def _simulated(run: Run) -> Summary:
    workload = run.workload
    scale = run.num_instances / RATED_INSTANCES
    trace = workload.make(
        run.traces,
        run.capacity_rps * run.load * scale,
        round(workload.num_requests * scale),
        run.seed,
    )
    hardware = load_hardware(workload.hardware)
    options = SimulationOptions(
        hardware=hardware,
        num_instances=run.num_instances,
        config=Config(
            policy=run.policy,
            scheduler={} if run.policy == "adaptive" else _step_times(hardware),
        ),
        report_delay_s=run.report_delay_s,
        seed=run.seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return summarise(simulate(trace, options), workload.slo)


def sustained_rate_rps(workload: Workload, traces: Path, folder: Path | None = None) -> float:
    """The highest rate at which `RATED_POLICY` keeps `RATED_SHARE` of the requests within their
    bounds, over `RATED_SEEDS`, to some percent."""

    longer = shortened(workload, RATED_LENGTH * workload.num_requests)

    def is_sustained(rate_rps: float) -> bool:
        shares = [
            simulate_run(
                Run(
                    workload=longer,
                    traces=traces,
                    policy=RATED_POLICY,
                    capacity_rps=rate_rps,
                    seed=seed,
                ),
                folder,
            ).slo_attainment
            for seed in RATED_SEEDS
        ]
        return sum(shares) / len(shares) >= RATED_SHARE

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


def simulate_all(
    runs: Sequence[Run], processes: int, folder: Path | None = None
) -> dict[Run, Summary]:
    """On as many cores, giving way to whatever else runs; what is kept is not made again."""
    summaries = {}
    with ProcessPoolExecutor(processes, initializer=os.nice, initargs=(_NICENESS,)) as pool:
        for number, (run, summary) in enumerate(
            zip(runs, pool.map(simulate_run, runs, [folder] * len(runs)), strict=True), start=1
        ):
            summaries[run] = summary
            print(
                f"[{number}/{len(runs)}] {run.workload.name} {run.policy} load {run.load:g}"
                f" seed {run.seed}: TTFT P99 {summary.ttft_s.p99:.2f} s",
                flush=True,
            )
    return summaries
