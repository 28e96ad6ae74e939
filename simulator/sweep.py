"""A grid of scenarios over all cores: a row of figures for each point and seed.

Points are independent and each is simulated in one process, so a grid takes as long as its share on
each core. Rows come in the order of the grid however long each took, so that two sweeps of the same
grid write the same file.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llumsched.core.params import check_param, params_of
from llumsched.policy_failures import Failure
from llumsched.simulator.results.comparison import COLUMNS, reduce_run
from llumsched.simulator.results.metrics import Slo
from llumsched.simulator.scenario import Scenario
from llumsched.simulator.simulation import simulate

_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One simulation of a sweep: the axes' values, the scenario that they make, the seed."""

    values: Mapping[str, Any]
    scenario: Scenario
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The figures of a point, by the keys of `comparison.COLUMNS`."""

    point: Point
    figures: Mapping[str, float]
    policy_failures: tuple[Failure, ...]
    warnings: tuple[str, ...]
    """Why the figures may not be believed as they stand."""
    is_complete: bool
    seed_matters: bool
    """True if another seed would be another run."""


def grid(scenario: Scenario, axes: Mapping[str, Sequence[Any]], num_seeds: int) -> list[Point]:
    """Every combination of the axes' values with every seed; the last axis changes fastest.

    Raises:
        ParamError: a value is out of range for its axis.
    """
    fields = {described.name: described for described in params_of(Scenario)}
    for name, values in axes.items():
        for value in values:
            check_param(fields[name], value)
    points = []
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        made = dataclasses.replace(scenario, **chosen)
        points += [Point(values=chosen, scenario=made, seed=seed) for seed in range(num_seeds)]
    return points


def simulate_point(point: Point, slo: Slo, hour_price: float | None = None) -> Row:
    """Simulate one point; ``hour_price`` is that of an instance's hour."""
    scenario = point.scenario
    # Fragmentation is computed from the time line.
    options = scenario.options(point.seed, record_timeline=True)
    trace = scenario.trace(point.seed)
    result = simulate(trace, options)
    run = reduce_run(
        result,
        label=scenario.policy,
        seed=point.seed,
        slo=slo,
        draw=False,
        hour_price=hour_price,
    )
    return Row(
        point=point,
        figures=run.figures(),
        policy_failures=run.policy_failures,
        warnings=tuple(run.warnings),
        is_complete=run.is_complete,
        seed_matters=run.seed_matters or not scenario.trace(point.seed + 1).is_same(trace),
    )


def sweep(
    points: Sequence[Point],
    slo: Slo,
    *,
    hour_price: float | None = None,
    num_processes: int,
    progress: Callable[[int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Iterator[Row]:
    """Simulate the points in processes; rows come in the order of the points.

    A combination whose first seed says that seeds change nothing has one row. When `stop` says so,
    what has not begun is left out.
    """
    first_of: dict[tuple[Any, ...], int] = {}
    for index, point in enumerate(points):
        first_of.setdefault(_combination(point), index)
    rows: dict[int, Row] = {}

    def others() -> Iterator[int]:
        for index, point in enumerate(points):
            first = rows.get(first_of[_combination(point)])
            if index not in rows and first is not None and first.seed_matters:
                yield index

    with ProcessPoolExecutor(num_processes, initializer=_ignore_interrupts) as pool:
        try:
            for indices in (iter(list(first_of.values())), others()):
                futures = {
                    pool.submit(simulate_point, points[i], slo, hour_price): i for i in indices
                }
                if not _collect(futures, rows, progress, stop):
                    break
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    yield from (rows[index] for index in sorted(rows))


def _combination(point: Point) -> tuple[Any, ...]:
    return tuple(point.values.values())


def _collect(
    futures: Mapping[Future[Row], int],
    rows: dict[int, Row],
    progress: Callable[[int], None] | None,
    stop: Callable[[], bool] | None,
) -> bool:
    """Take in rows as they come; False if it is to stop, once those that have begun have ended."""
    pending = set(futures)
    goes_on = True
    while pending:
        done, pending = wait_for(pending, timeout=_POLL_S)
        for future in done:
            if not future.cancelled():
                rows[futures[future]] = future.result()
        if progress is not None:
            progress(len(rows))
        if goes_on and stop is not None and stop():
            goes_on = False
            for future in pending:
                future.cancel()
    return goes_on


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """The rows as CSV: the axes, the seed, every figure."""
    axes = list(rows[0].point.values) if rows else []
    keys = [column.key for column in COLUMNS]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        header = [f"{c.key} ({c.unit})" if c.unit else c.key for c in COLUMNS]
        writer.writerow([*axes, "seed", *header])
        for row in rows:
            figures = [row.figures[key] for key in keys]
            cells = ["" if value != value else value for value in figures]
            writer.writerow([*row.point.values.values(), row.point.seed, *cells])


def _ignore_interrupts() -> None:
    """Ctrl-C reaches every process of the terminal; only the parent is to act on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
