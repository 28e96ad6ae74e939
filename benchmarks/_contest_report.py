"""A contest's outcome as figures, tables and notes."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks._contest import METRICS, NUM_BLOCKS, URGENT, Outcome
from benchmarks._report import Figure, Table
from scripts.pages import number

NO_WORSE_THAN = 1.03
GOAL_METRICS = ("TTFT P99", "longest gap P99")
GOAL_SHAPES = ("bursts", "long prompts")
GOAL_LOAD = 0.95


def ratio_figures(outcome: Outcome, ours: str, *, at_most: float) -> list[Figure]:
    """For each shape and load and metric, ours over the best of the others."""
    return [
        Figure(
            name=f"{shape}, {load:.0%}: {metric} of {ours} over the best other's ({best})",
            value=outcome.ratios(shape, load, metric, ours, best)[0],
            unit="",
            at_most=at_most,
        )
        for shape, load in cells(outcome)
        for metric in metrics(shape)
        for best in [best_other(outcome, shape, load, metric, ours)]
    ]


def goal_figures(outcome: Outcome, ours: str, *, at_most: float) -> list[Figure]:
    """Where migration should pay: the better of the two figures that it is meant for."""
    found = []
    for shape, load in cells(outcome):
        if shape not in GOAL_SHAPES or load != GOAL_LOAD:
            continue
        ratios = {
            metric: outcome.ratios(
                shape, load, metric, ours, best_other(outcome, shape, load, metric, ours)
            )[0]
            for metric in GOAL_METRICS
        }
        metric = min(ratios, key=ratios.__getitem__)
        found.append(
            Figure(
                name=f"{shape}, {load:.0%}: {metric}, the better of two, over the best other's",
                value=ratios[metric],
                unit="",
                at_most=at_most,
            )
        )
    return found


def ratio_tables(outcome: Outcome, ours: str) -> list[Table]:
    """A table for each shape: seconds of ours, and the ratios to each other contestant."""
    tables = []
    for shape in outcome.plan.shapes:
        others = [name for name in outcome.names if name != ours]
        rows: list[list[str | float]] = []
        for load in outcome.plan.loads:
            for metric in metrics(shape):
                row: list[str | float] = [f"{load:.0%}", metric]
                row.append(outcome.median_s(shape, load, metric, ours))
                for other in others:
                    median, least, most = outcome.ratios(shape, load, metric, ours, other)
                    spread = f" [{number(least)}, {number(most)}]" if least != most else ""
                    row.append(number(median) + spread)
                rows.append(row)
            rows.append([f"{load:.0%}", "preemptions", *_preemptions(outcome, shape, load, ours)])
        tables.append(
            Table(
                title=f"{shape[:1].upper()}{shape[1:]}: {ours} over others",
                columns=["load", "figure", f"{ours}, s", *(f"over {o}" for o in others)],
                rows=rows,
            )
        )
    return tables


def _preemptions(outcome: Outcome, shape: str, load: float, ours: str) -> Iterator[str | float]:
    totals = dict.fromkeys((ours, *outcome.names), 0.0)
    for cell, by_name in outcome.num_preemptions.items():
        if (cell.shape, cell.load) == (shape, load):
            for name, count in by_name.items():
                totals[name] += count
    yield totals.pop(ours)
    for count in totals.values():
        yield f"{count:.0f} there"


def cells(outcome: Outcome) -> list[tuple[str, float]]:
    """Shapes and loads that were run, in order."""
    return [(shape, load) for shape in outcome.plan.shapes for load in outcome.plan.loads]


def metrics(shape: str) -> tuple[str, ...]:
    """Figures that a shape has."""
    return (*METRICS, URGENT) if shape == "priorities" else METRICS


def best_other(outcome: Outcome, shape: str, load: float, metric: str, ours: str) -> str:
    """The contestant, other than ours, with the least median."""
    others = [name for name in outcome.names if name != ours]
    return min(others, key=lambda name: outcome.median_s(shape, load, metric, name))


def notes(outcome: Outcome) -> list[str]:
    """Notes that say which part was run."""
    plan = outcome.plan
    capacities = ", ".join(
        f"{shape} {number(rate)} requests a second" for shape, rate in outcome.capacity_rps.items()
    )
    loads = ", ".join(f"{load:.0%}" for load in plan.loads)
    return [
        (
            f"Run: {', '.join(plan.shapes)}; loads {loads}; {plan.num_seeds} seeds;"
            f" {plan.num_requests} requests a cell and contestant."
        ),
        (
            f"Capacity: {capacities}. Each engine has {NUM_BLOCKS} blocks of 32 tokens; clients,"
            " frontends and engines share the cores."
        ),
    ]
