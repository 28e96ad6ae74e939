"""``llumsched sweep``: a grid of simulations over all cores."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from llumsched import __version__
from llumsched.commands import CommandError
from llumsched.commands._failures import add_failures, status_of_failures
from llumsched.commands._scenario import (
    FIELDS,
    SHORT,
    add_price,
    add_scenario,
    add_slo,
    said_in_one_line,
    scenario_of,
    slo_of,
    type_of,
)
from llumsched.commands.simulate import INTERRUPTED, Interrupt
from llumsched.plugins import unknown_name
from llumsched.simulator.results.comparison import COLUMNS, FigureColumn, Spread, numbers
from llumsched.simulator.results.sweep_report import write_sweep_report
from llumsched.simulator.sweep import Row, grid, sweep, write_rows

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_SHOWN = (
    *("ttft_mean", "ttft_p99", "tpot_mean", "tpot_p99", "gap_p99", "e2e_p99"),
    *("slo", "goodput", "mean_instances", "token_hours", "token_cost"),
)
_NUMBERS = re.compile(r"\d[\d.,]*")


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add this command's parser."""
    parser = subparsers.add_parser(
        "sweep",
        help="simulate a grid of settings over all cores",
        description=(
            "Simulate every combination of the values of some options, each with every seed, in"
            " parallel. Ctrl-C ends it and keeps the points that are done."
        ),
    )
    add_scenario(parser)
    parser.add_argument(
        "--grid",
        action="append",
        required=True,
        metavar="OPTION=A,B,...",
        help="an option above and its values, such as policy=latency,infaas; repeat for more",
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="K", help="runs with seeds 0 to K-1 (default: 1)"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="processes (default: one a core that may be used)"
    )
    add_slo(parser)
    add_price(parser)
    add_failures(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every row there, as CSV")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write a page with charts there: the figures over one option, a line for the others",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the grid; print a line a point, and write a row a simulation."""
    for name, value in (("--seeds", args.seeds), ("--jobs", args.jobs)):
        if value is not None and value < 1:
            raise CommandError(f"{name} {value}: at least 1 is needed")
    axes = _axes(args)
    with said_in_one_line():
        points = grid(scenario_of(args), axes, args.seeds)
        for point in points:
            point.scenario.options(point.seed)  # every mistake shows before the first long run
        points[0].scenario.trace(seed=0)
        with (
            Interrupt() as interrupt,
            tqdm(
                total=len(points), unit=" runs", leave=False, disable=True if args.quiet else None
            ) as bar,
        ):

            def progress(num_done: int) -> None:
                bar.update(num_done - bar.n)

            rows = list(
                sweep(
                    points,
                    slo_of(args),
                    hour_price=args.hour_price,
                    num_processes=args.jobs or len(os.sched_getaffinity(0)),
                    progress=progress,
                    stop=lambda: interrupt.is_set,
                )
            )
        columns = _columns(rows)
        print(_table(list(axes), rows, columns))
        failures = _failures(list(axes), rows)
        print("".join(f"{line}\n" for line in failures), end="")
        warnings = _warnings(list(axes), rows)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        settled = sum(not row.seed_matters for row in rows)
        if settled and args.seeds > 1:
            print(
                f"note: for {settled} points one run is all {args.seeds} seeds: their trace is"
                " recorded and no decision draws anything (--resample draws its arrivals anew)"
            )
        if args.out is not None:
            write_rows(rows, args.out)
            print(f"\nwritten: {args.out}, {len(rows)} of {len(points)} runs")
        if args.report is not None and rows:
            _write_report(args, rows, columns, [*failures, *warnings])
            print(f"\nwritten: {args.report}")
    if interrupt.is_set:
        print(f"interrupted: {len(rows)} of {len(points)} runs are done", file=sys.stderr)
        return INTERRUPTED
    return status_of_failures(args, [failure for row in rows for failure in row.policy_failures])


def _axes(args: argparse.Namespace) -> dict[str, list[Any]]:
    """Option -> values; what is given twice is a mistake."""
    axes: dict[str, list[Any]] = {}
    for text in args.grid:
        name, values = _axis(text)
        if name in axes or hasattr(args, name):
            where = "two --grid" if name in axes else f"--grid and --{name.replace('_', '-')}"
            raise CommandError(f"{name} is given by {where}: give all its values in one --grid")
        double = [value for index, value in enumerate(values) if value in values[:index]]
        if double:
            raise CommandError(f"--grid {text}: {double[0]} is named twice: each value once")
        axes[name] = values
    return axes


def _axis(text: str) -> tuple[str, list[Any]]:
    name, _, values = text.partition("=")
    name = name.strip().replace("-", "_")
    name = next((field for field, short in SHORT.items() if short == name), name)
    if name not in FIELDS:
        raise CommandError("--grid: " + unknown_name("option", name, FIELDS))
    if FIELDS[name].type is bool:
        return name, [_boolean(name, word) for word in values.split(",")]
    try:
        return name, [type_of(FIELDS[name])(word.strip()) for word in values.split(",")]
    except ValueError:
        kind = FIELDS[name].type_name
        raise CommandError(f"--grid {text}: the values of {name} must be {kind}") from None


def _boolean(name: str, word: str) -> bool:
    try:
        return {"true": True, "false": False}[word.strip().lower()]
    except KeyError:
        raise CommandError(f"--grid {name}: true or false, not {word!r}") from None


def _write_report(
    args: argparse.Namespace,
    rows: Sequence[Row],
    columns: Sequence[FigureColumn],
    remarks: Sequence[str],
) -> None:
    scenario = scenario_of(args)
    axes = rows[0].point.values
    write_sweep_report(
        args.report,
        rows,
        columns,
        title=f"{scenario.traffic}: sweep of {', '.join(axes).replace('_', ' ')}",
        subtitle=f"simulated by llumsched {__version__}",
        settings={
            "traffic": scenario.traffic,
            **{
                name.replace("_", " "): str(getattr(scenario, name))
                for name, described in FIELDS.items()
                if name not in axes
                and (
                    name in ("hardware", "instances", "policy", "engine")
                    or getattr(scenario, name) != described.default
                )
            },
        },
        remarks=remarks,
    )


def _failures(axes: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Which points are not what they are called, and why."""
    said: dict[str, int] = {}
    for row in rows:
        point = ", ".join(f"{axis}={row.point.values[axis]}" for axis in axes)
        for failure in row.policy_failures:
            text = f"{point}: {failure.sentence()}"
            said[text] = said.get(text, 0) + failure.count
    return [
        f"{text} ({count:,} times; the scheduler decided by itself)" for text, count in said.items()
    ]


def _warnings(axes: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Each warning once, whatever its numbers, with the points that it is about."""
    first: dict[str, str] = {}
    about: dict[str, dict[str, None]] = {}
    for row in rows:
        point = ", ".join(f"{axis}={row.point.values[axis]}" for axis in axes)
        for text in row.warnings:
            kind = _NUMBERS.sub("N", text)
            first.setdefault(kind, text)
            about.setdefault(kind, {})[point] = None
    num_points = len({tuple(row.point.values.values()) for row in rows})
    said = []
    for kind, points in about.items():
        others = f" and {len(points) - 1} more points" if len(points) > 1 else ""
        where = "every point" if len(points) == num_points else f"{next(iter(points))}{others}"
        said.append(f"{where}: {first[kind]}")
    return said


def _columns(rows: Sequence[Row]) -> list[FigureColumn]:
    """The figures that are shown: those that any row has."""
    return [
        column
        for column in COLUMNS
        if column.key in _SHOWN
        and any(r.figures[column.key] == r.figures[column.key] for r in rows)
    ]


def _table(axes: Sequence[str], rows: Sequence[Row], columns: Sequence[FigureColumn]) -> str:
    """A line a point: the mean of each figure over its seeds."""
    header = [*axes, *(f"{c.label} ({c.unit})" if c.unit else c.label for c in columns)]
    by_point: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        by_point.setdefault(tuple(row.point.values.values()), []).append(row)
    figures = [
        numbers([Spread.of(r.figures[c.key] for r in group).mean for group in by_point.values()])
        for c in columns
    ]
    lines = [[*map(str, values), *cells] for values, *cells in zip(by_point, *figures, strict=True)]
    widths = [max(map(len, cells)) for cells in zip(header, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < len(axes) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, *lines)
    )
