"""Speed of the simulator: seconds, memory, and how both grow with requests and instances.

A trace of chats (ShareGPT's published lengths, Poisson arrivals) runs through a cluster of
instances of an 8B model on an H100. The KV cache is cut down so that it is two thirds full, and one
request in five hundred is of high priority, so that others move out of its way. Every case runs
alone, in a process of its own; what is held to goals is the processor time of `simulate`, which is
what one core needs for it, whoever else is on the machine. Memory is the most that the process
ever held. Vidur, where it can be had from the package index, simulates a smaller trace beside it.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks import _vidur
from benchmarks._report import Figure, Report, Table, main
from llumsched.config import Config
from llumsched.simulator.hardware.spec import load_hardware
from llumsched.simulator.options import SimulationOptions
from llumsched.simulator.simulation import simulate
from llumsched.simulator.traces.generators import GeneratorOptions, generate

BENCHMARK = "Speed of the simulator"

HARDWARE = Path(__file__).parents[1] / "configs" / "hardware" / "h100-llama-3.1-8b.yaml"
TRACE = "sharegpt"
RATE_PER_INSTANCE_RPS = 13.0
NUM_KV_BLOCKS = 4000
HIGH_PRIORITY_SHARE = 0.002
MIGRATING = "latency"
# No migration: turns, the freest instance, and the policy of the system whose speed is the mark.
NOT_MIGRATING = ("round_robin", "infaas", "dynamo")

NUM_REQUESTS = 1_000_000
NUM_INSTANCES = 64
SECONDS_GOAL = 60.0
MEGABYTES_GOAL = 2000.0
# Published for the offline replay of NVIDIA Dynamo: a laptop core, 8 workers, no migration.
DYNAMO_RPS = 9800.0
DYNAMO_WORKERS = 8
VIDUR_REQUESTS = 2000

NOTE = (
    f"Arrivals are {RATE_PER_INSTANCE_RPS:g} a second for each instance; loads are reported ten"
    f" times a second; an instance has {NUM_KV_BLOCKS:,} blocks of 16 tokens. The exponent is that"
    " of processor time against the number, at a constant load of each instance: 1 is linear."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One simulation."""

    num_requests: int
    num_instances: int
    policy: str = MIGRATING


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Time and memory that a run took."""

    case: Case
    seconds: float
    processor_s: float
    """The same without what other programs took of the core."""
    megabytes: float
    num_steps: int
    num_migrations: int
    num_preemptions: int

    @property
    def requests_per_s(self) -> float:
        """Requests simulated in a second."""
        return self.case.num_requests / self.processor_s


def measure(case: Case) -> Measured:
    """Run one case in this process, which must be new: memory only ever grows."""
    trace = generate(
        TRACE,
        GeneratorOptions(
            num_requests=case.num_requests,
            rate_rps=RATE_PER_INSTANCE_RPS * case.num_instances,
        ),
    ).with_priorities(HIGH_PRIORITY_SHARE, seed=0)
    options = SimulationOptions(
        hardware=load_hardware(HARDWARE),
        num_instances=case.num_instances,
        num_kv_blocks=NUM_KV_BLOCKS,
        config=Config.default(case.policy),
    )
    # Modules are loaded and policies found by a simulation that is not timed.
    simulate(trace.head(1), options)
    start, processor_start = time.perf_counter(), time.process_time()
    result = simulate(trace, options)
    seconds, processor_s = time.perf_counter() - start, time.process_time() - processor_start
    return Measured(
        case=case,
        seconds=seconds,
        processor_s=processor_s,
        megabytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        num_steps=result.num_steps,
        num_migrations=sum(m.outcome == "committed" for m in result.migrations),
        num_preemptions=int(result.num_preemptions.sum()),
    )


def measure_alone(case: Case) -> Measured:
    """`measure`, in a process of its own."""
    print(
        f"{case.policy}: {case.num_requests:,} requests, {case.num_instances} instances",
        file=sys.stderr,
        flush=True,
    )
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(measure, case).result()


def exponent(numbers: Sequence[int], values: Sequence[float]) -> float:
    """How the values grow with the numbers: 1 is linear."""
    x, y = [math.log(n) for n in numbers], [math.log(v) for v in values]
    return statistics.linear_regression(x, y).slope


def run(quick: bool) -> Report:
    """Measure the goal, the mark, and the growth."""
    scale = 100 if quick else 1
    goal = measure_alone(Case(num_requests=NUM_REQUESTS // scale, num_instances=NUM_INSTANCES))
    at_mark = [
        measure_alone(
            Case(num_requests=100_000 // scale, num_instances=DYNAMO_WORKERS, policy=policy)
        )
        for policy in NOT_MIGRATING
    ]
    numbers = [n // scale for n in (25_000, 50_000, 100_000, 200_000)]
    by_requests = [measure_alone(Case(num_requests=n, num_instances=16)) for n in numbers]
    instances = [4, 8] if quick else [4, 16, 64, 256]
    by_instances = [
        measure_alone(Case(num_requests=3200 * n // scale, num_instances=n)) for n in instances
    ]

    vidur_figures, vidur_notes = _beside_vidur(quick)
    requests, many = goal.case.num_requests, goal.case.num_instances
    figures = [
        Figure(
            name=f"{requests:,} requests on {many} instances, migration on",
            value=goal.processor_s,
            unit="s",
            at_most=SECONDS_GOAL,
        ),
        Figure(
            name="peak memory of that, the trace included",
            value=goal.megabytes,
            unit="MB",
            at_most=MEGABYTES_GOAL,
        ),
        *(
            Figure(
                name=f"{DYNAMO_WORKERS} instances without migration, {m.case.policy}",
                value=m.requests_per_s,
                unit="requests/s",
                at_least=DYNAMO_RPS,
            )
            for m in at_mark
        ),
        Figure(
            name="growth of processor time with requests, 16 instances (exponent)",
            value=exponent(numbers, [m.processor_s for m in by_requests]),
            unit="",
        ),
        Figure(
            name="growth of processor time a request with instances (exponent)",
            value=exponent(instances, [m.processor_s / m.case.num_requests for m in by_instances]),
            unit="",
        ),
        *vidur_figures,
    ]
    tables = [
        Table(title="Every case", columns=_COLUMNS, rows=[_row(m) for m in (goal, *at_mark)]),
        Table(
            title="With the number of requests",
            columns=_COLUMNS,
            rows=[_row(m) for m in by_requests],
        ),
        Table(
            title="With the number of instances",
            columns=_COLUMNS,
            rows=[_row(m) for m in by_instances],
        ),
    ]
    return Report(figures=figures, tables=tables, notes=[NOTE, *vidur_notes])


def _beside_vidur(quick: bool) -> tuple[list[Figure], list[str]]:
    if quick:
        return [], ["Vidur is not installed for a quick run."]
    trace = generate(
        TRACE,
        GeneratorOptions(
            num_requests=VIDUR_REQUESTS, rate_rps=RATE_PER_INSTANCE_RPS * _vidur.NUM_INSTANCES
        ),
    )
    try:
        both = _vidur.beside(trace, load_hardware(HARDWARE), NUM_KV_BLOCKS)
    except _vidur.VidurMissing as error:
        return [], [f"Vidur from the package index could not be run here: {error}"]
    figures = [
        Figure(
            name=f"Vidur {both.version}, {both.num_requests:,} requests, processor time by ours",
            value=both.vidur_s / both.ours_s,
            unit="x",
        )
    ]
    note = (
        f"Vidur {both.version}: {both.num_requests:,} requests on {_vidur.NUM_INSTANCES} instances"
        " in turn, both without prefix caches or migration, both with steps of a line in requests"
        f" and context: {both.vidur_s:.1f} s of a processor for Vidur, {both.ours_s:.2f} s for"
        f" ours; the last request ended at {both.vidur_makespan_s:.1f} s and"
        f" {both.ours_makespan_s:.1f} s."
    )
    return figures, [note]


_COLUMNS = [
    "policy",
    "requests",
    "instances",
    "seconds",
    "processor seconds",
    "us a request",
    "MB",
    "steps",
    "migrations",
    "preemptions",
]


def _row(measured: Measured) -> list[str | float]:
    case = measured.case
    return [
        case.policy,
        f"{case.num_requests:,}",
        f"{case.num_instances:,}",
        measured.seconds,
        measured.processor_s,
        measured.processor_s / case.num_requests * 1e6,
        measured.megabytes,
        f"{measured.num_steps:,}",
        f"{measured.num_migrations:,}",
        f"{measured.num_preemptions:,}",
    ]


if __name__ == "__main__":
    sys.exit(main(run))
