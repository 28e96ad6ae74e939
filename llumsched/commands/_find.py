"""``simulate --find``: how many instances, or how high a rate, for an objective."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn, Protocol

from tqdm import tqdm

from llumsched.commands import CommandError
from llumsched.commands._scenario import slo_of
from llumsched.simulator.results.comparison import Run, reduce_run
from llumsched.simulator.scenario import Scenario
from llumsched.simulator.search import Found, highest_rate, least_instances
from llumsched.simulator.simulation import simulate

KINDS = ("instances", "rate")
DEFAULT_ATTAINMENT = 0.99
# Of the time that a request takes on average: for how long requests must arrive to be believed.
FEWEST_TURNS = 10


class Stop(Protocol):
    """Request for an orderly end, from whoever may ask for one."""

    is_set: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """The answer for one policy, with the runs at it."""

    label: str
    kind: str
    found: Found
    shares: Mapping[float, float]
    """Size tried -> share of requests that kept the objective."""
    runs: list[Run]
    rate_rps: float
    """Requests a second at the size that was found; NaN where none was."""

    def sentence(self, attainment: float) -> str:
        """The answer in words."""
        best, beyond = self.found.best, self.found.next_worse
        size = beyond if best is None else best
        unit = "requests/s" if self.kind == "rate" else "instance" + "s" * (size != 1)
        if best is None:
            assert beyond is not None
            return (
                f"{self.label}: nothing keeps it: {beyond:g} {unit} keep it for"
                f" {self.shares[beyond]:.1%} of the requests, {attainment:.1%} is asked for"
            )
        edge = f"; {beyond:g} keep {self.shares[beyond]:.1%}" if beyond is not None else ""
        keep = "keeps" if unit == "instance" else "keep"
        return f"{self.label}: {best:g} {unit} {keep} it for {self.shares[best]:.1%}{edge}"

    def brevity(self) -> str | None:
        """The warning that a run at this size is over before the pool is in its stride, or `None`.

        Requests that have not ended load the pool that the next ones meet. Where few have ended
        when the last one arrives, the bounds are kept by a pool that was still filling up.
        """
        if not self.runs:
            return None
        summary = self.runs[0].summary
        arriving_s = summary.num_requests / self.rate_rps
        taken_s = summary.e2e_s.mean
        if not arriving_s < FEWEST_TURNS * taken_s:
            return None
        return (
            f"{self.label}: SHORT RUN: {summary.num_requests:,} requests arrive within"
            f" {arriving_s:.1f} s and take {taken_s:.1f} s each: a pool that goes on may keep less;"
            " give more --requests"
        )


def add_find(parser: argparse.ArgumentParser) -> None:
    """The options of a search."""
    group = parser.add_argument_group(
        "sizing", "search for the size at which the bounds above are just kept"
    )
    group.add_argument(
        "--find",
        choices=KINDS,
        help="the fewest instances for this traffic, or the highest rate for these instances",
    )
    group.add_argument(
        "--attainment",
        type=float,
        metavar="X",
        help=f"share of requests that must keep the bounds (default: {DEFAULT_ATTAINMENT})",
    )


def check_find(args: argparse.Namespace) -> None:
    """Refuse what cannot be searched for.

    Raises:
        CommandError: there is no bound, or an option means nothing in a search.
    """
    if args.find is None:
        if args.attainment is not None:
            raise CommandError("--attainment is of a search: add --find instances or --find rate")
        return
    if slo_of(args).is_empty:
        raise CommandError(f"--find {args.find} needs a bound to keep: --slo-ttft-s, --slo-tpot-s")
    if args.attainment is not None and not 0 < args.attainment <= 1:
        raise CommandError(f"--attainment {args.attainment:g}: above 0, at most 1")
    if args.out is not None:
        raise CommandError("--out is of a single size: run the one that --find finds with --out")


def find(
    args: argparse.Namespace, scenarios: Mapping[str, Scenario], interrupt: Stop
) -> list[Sized]:
    """Search for every policy in turn; the mean over the seeds decides."""
    with tqdm(unit=" sizes", leave=False, disable=True if args.quiet else None) as bar:
        return [_find(args, name, scenario, interrupt, bar) for name, scenario in scenarios.items()]


def attainment_of(args: argparse.Namespace) -> float:
    """The share that is asked for."""
    return DEFAULT_ATTAINMENT if args.attainment is None else float(args.attainment)


def _find(
    args: argparse.Namespace,
    label: str,
    scenario: Scenario,
    interrupt: Stop,
    bar: tqdm[NoReturn],
) -> Sized:
    tried: dict[float, list[Run]] = {}
    shares: dict[float, float] = {}

    def keeps(size: float) -> bool:
        if interrupt.is_set:
            raise KeyboardInterrupt
        bar.set_description(f"{label}, {size:g} {args.find}")
        sized = (
            dataclasses.replace(scenario, instances=int(size))
            if args.find == "instances"
            else dataclasses.replace(scenario, rate_rps=size)
        )
        tried[size] = [_run(args, label, sized, seed, interrupt) for seed in range(args.seeds)]
        shares[size] = sum(r.summary.slo_attainment for r in tried[size]) / args.seeds
        bar.update()
        return shares[size] >= attainment_of(args)

    if args.find == "instances":
        # With an instance for each request nobody waits for another.
        found = least_instances(keeps, scenario.instances, most=len(scenario.trace(0)))
    else:
        start_rps = scenario.rate_rps or scenario.trace(0).rate_rps
        if not start_rps > 0:
            raise CommandError("--find rate: all requests arrive at once: say a --rate to begin at")
        found = highest_rate(keeps, start_rps)
    is_rate = args.find == "rate"
    return Sized(
        label=label,
        kind=args.find,
        found=found,
        shares=shares,
        runs=tried.get(found.best, []) if found.best is not None else [],
        rate_rps=(found.best or math.nan) if is_rate else scenario.trace(0).rate_rps,
    )


def _run(
    args: argparse.Namespace, label: str, scenario: Scenario, seed: int, interrupt: Stop
) -> Run:
    result = simulate(
        scenario.trace(seed),
        scenario.options(seed, record_timeline=True),
        stop=lambda: interrupt.is_set,
    )
    return reduce_run(
        result,
        label=label,
        seed=seed,
        slo=slo_of(args),
        draw=False,
        hour_price=args.hour_price,
    )
