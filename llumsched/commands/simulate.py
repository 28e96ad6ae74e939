"""``llumsched simulate``: what a policy would do to this traffic on this hardware, on a laptop."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Self

from tqdm import tqdm

from llumsched import __version__
from llumsched.commands import CommandError
from llumsched.commands._failures import add_failures, status_of_failures
from llumsched.commands._find import (
    add_find,
    attainment_of,
    check_find,
    find,
)
from llumsched.commands._scenario import (
    FIELDS,
    add_price,
    add_scenario,
    add_slo,
    said_in_one_line,
    scenario_of,
    slo_of,
)
from llumsched.simulator.labels import file_name, labels
from llumsched.simulator.results.chrome_trace import write_chrome_trace
from llumsched.simulator.results.comparison import Run, as_json, by_label, reduce_run, text_table
from llumsched.simulator.results.export import check_parquet, write_csv, write_parquet
from llumsched.simulator.results.remarks import remarks, warnings_of
from llumsched.simulator.results.report import write_report
from llumsched.simulator.results.result import SimulationResult
from llumsched.simulator.scenario import Scenario
from llumsched.simulator.simulation import simulate
from llumsched.simulator.traces.trace import Trace

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

INTERRUPTED = 130


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add this command's parser."""
    parser = subparsers.add_parser(
        "simulate",
        help="simulate a trace under one policy or several, on modelled hardware",
        description=(
            "Simulate traffic on modelled instances under the scheduler that serves, and print the"
            " figures of each policy side by side. Ctrl-C ends the run and keeps what there is. The"
            " exit status is 1 if a policy raised or answered nonsense."
        ),
    )
    add_scenario(parser)
    parser.add_argument(
        "--compare", metavar="A,B,C", help="policies to put side by side, instead of --policy"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="K", help="runs with seeds 0 to K-1 (default: 1)"
    )
    add_slo(parser)
    add_price(parser)
    add_find(parser)
    add_failures(parser)
    output = parser.add_argument_group("results")
    output.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write report.html, summary.json and a record a request (CSV) there",
    )
    output.add_argument("--parquet", action="store_true", help="records as Parquet too")
    output.add_argument(
        "--chrome-trace", action="store_true", help="a trace for Perfetto, of the first seed"
    )
    output.add_argument(
        "--decision-log", action="store_true", help="a log for 'llumsched replay', of every run"
    )
    output.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run every policy with every seed; print the comparison and write the files."""
    if args.seeds < 1:
        raise CommandError(f"--seeds {args.seeds}: at least 1 is needed")
    if args.out is None and (args.parquet or args.chrome_trace or args.decision_log):
        raise CommandError("--parquet, --chrome-trace and --decision-log need --out DIR")
    check_find(args)
    with said_in_one_line():
        scenarios = _scenarios(args)
        for scenario in scenarios.values():
            scenario.options(seed=0)  # every mistake shows before the first long run
        if args.find is not None:
            return _run_search(args, scenarios)
        if args.parquet:
            check_parquet()
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
        with Interrupt() as interrupt:
            done = _run_all(args, scenarios, interrupt)
        runs = done.runs
        said = [*remarks(runs), *done.notes]
        print(text_table(runs))
        print("\n" + "\n".join(said))
        for warning in warnings_of(runs):
            print(f"warning: {warning}", file=sys.stderr)
        if args.out is not None:
            _write_comparison(args.out, next(iter(scenarios.values())), done, said)
            print(f"\nwritten: {args.out / 'report.html'} and the files that it sums up")
    if interrupt.is_set:
        print("interrupted: the figures are of what had been simulated by then", file=sys.stderr)
        return INTERRUPTED
    return status_of_failures(args, [failure for run in runs for failure in run.policy_failures])


def _run_search(args: argparse.Namespace, scenarios: Mapping[str, Scenario]) -> int:
    """Print the size that was found for each policy, and the figures at it."""
    with Interrupt() as interrupt:
        sized = find(args, scenarios, interrupt)
    runs = [run for answer in sized for run in answer.runs]
    if runs:
        print(f"{text_table(runs)}\n")
    notes = [f"note: {note}" for note in next(iter(scenarios.values())).trace(0).notes]
    print("".join(f"{line}\n" for line in [*remarks(runs), *notes]))
    for answer in sized:
        print(answer.sentence(attainment_of(args)))
    short = [text for answer in sized if (text := answer.brevity()) is not None]
    for warning in [*warnings_of(runs), *short]:
        print(f"warning: {warning}", file=sys.stderr)
    return status_of_failures(args, [failure for run in runs for failure in run.policy_failures])


def _scenarios(args: argparse.Namespace) -> dict[str, Scenario]:
    """The scenario of each policy by its label."""
    scenario = scenario_of(args)
    names = [scenario.policy]
    if args.compare is not None:
        if hasattr(args, "policy"):
            raise CommandError(
                f"--compare and --policy: name {args.policy!r} in --compare with the others"
            )
        names = [name.strip() for name in args.compare.split(",") if name.strip()]
        if not names:
            raise CommandError("--compare: name policies with commas between: latency,round_robin")
    try:
        named = labels(names)
    except ValueError as error:
        raise CommandError(f"--compare {error}") from error
    return {
        label: dataclasses.replace(scenario, policy=name)
        for label, name in zip(named, names, strict=True)
    }


@dataclasses.dataclass(slots=True, kw_only=True)
class _Done:
    """The runs that were simulated, and remarks on their traffic."""

    runs: list[Run] = dataclasses.field(default_factory=list)
    trace: Trace
    """Of the first seed."""
    notes: list[str]


def _run_all(
    args: argparse.Namespace, scenarios: Mapping[str, Scenario], interrupt: Interrupt
) -> _Done:
    """Every policy with every seed, or as many as came before the interruption.

    Where neither the trace nor a policy draws anything, one seed is all seeds.
    """
    first = next(iter(scenarios.values()))
    done = _Done(trace=first.trace(0), notes=[])
    done.notes += [f"note: {note}" for note in done.trace.notes]
    is_drawn = args.seeds > 1 and not first.trace(1).is_same(done.trace)
    settled: set[str] = set()
    with tqdm(
        unit=" requests", unit_scale=True, leave=False, disable=True if args.quiet else None
    ) as bar:
        for seed in range(args.seeds):
            trace = first.trace(seed)
            bar.total = len(trace) * len(scenarios) * args.seeds
            for label, scenario in scenarios.items():
                if label in settled:
                    continue
                bar.set_description(f"{label}, seed {seed}")
                start = len(done.runs) * len(trace)

                def progress(num_done: int, _now_s: float, start: int = start) -> None:
                    bar.update(start + num_done - bar.n)

                result = simulate(
                    trace,
                    scenario.options(
                        seed,
                        record_timeline=True,
                        decision_log=_decision_log(args, label, seed),
                    ),
                    progress=progress,
                    stop=lambda: interrupt.is_set,
                )
                done.runs.append(
                    reduce_run(
                        result,
                        label=label,
                        seed=seed,
                        slo=slo_of(args),
                        draw=seed == 0,
                        hour_price=args.hour_price,
                    )
                )
                if args.out is not None:
                    _write_run(args, label, seed, result)
                if interrupt.is_set:
                    return done
                if not is_drawn and not result.uses_randomness:
                    settled.add(label)
    if settled and args.seeds > 1:
        done.notes.append(_seeds_change_nothing(args, list(scenarios), settled))
    return done


def _seeds_change_nothing(
    args: argparse.Namespace, every: Sequence[str], settled: Collection[str]
) -> str:
    whose = "" if len(settled) == len(every) else f" under {', '.join(settled)}"
    again = "; --resample draws its arrivals anew" if not hasattr(args, "resample") else ""
    return (
        f"note: one run{whose} is all {args.seeds} seeds: the trace is recorded and no decision"
        f" draws anything, so it says nothing about chance{again}"
    )


def _decision_log(args: argparse.Namespace, label: str, seed: int) -> Path | None:
    if not args.decision_log:
        return None
    folder: Path = args.out / f"decisions-{file_name(label)}-{seed}"
    return folder


def _write_run(args: argparse.Namespace, label: str, seed: int, result: SimulationResult) -> None:
    name = f"{file_name(label)}-{seed}"
    write_csv(result, args.out / f"requests-{name}.csv")
    if args.parquet:
        write_parquet(result, args.out / f"requests-{name}.parquet")
    if args.chrome_trace and seed == 0:
        write_chrome_trace(result, args.out / f"chrome-trace-{name}.json")


def _write_comparison(folder: Path, scenario: Scenario, done: _Done, said: Sequence[str]) -> None:
    """The files about all runs: ``summary.json`` and ``report.html``."""
    runs, trace = done.runs, done.trace
    settings = {
        "traffic": f"{scenario.traffic}: {len(trace):,} requests at {trace.rate_rps:.3g}/s",
        **{
            name.replace("_", " "): str(getattr(scenario, name))
            for name, described in FIELDS.items()
            if name != "policy" and getattr(scenario, name) != described.default
        },
    }
    for name in ("instances", "hardware", "engine"):
        settings[name] = str(getattr(scenario, name))
    content = {
        "version": __version__,
        "scenario": {**dataclasses.asdict(scenario), "policy": list(by_label(runs))},
        "trace_notes": list(trace.notes),
        "remarks": list(said),
        "runs": as_json(runs),
    }
    (folder / "summary.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    write_report(
        folder / "report.html",
        runs,
        title=f"{trace.name} on {scenario.instances} instances",
        subtitle=f"{scenario.hardware}, {scenario.engine}; simulated by llumsched {__version__}",
        settings=settings,
        notes=trace.notes,
        remarks=remarks(runs),
    )


class Interrupt:
    """The first Ctrl-C asks for an orderly end, a second one is an ordinary Ctrl-C."""

    def __init__(self) -> None:
        self.is_set = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.is_set = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
