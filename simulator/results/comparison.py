"""Several policies on the same traffic, over several seeds: what to say about each, side by side.

A run is reduced to its figures as soon as it has ended, so that a comparison of long runs does not
hold them all. The spread of a figure is its least and greatest value over the seeds: with three or
five of them, a standard deviation would promise more than there is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llumsched.policy_failures import Failure, traceback_of
from llumsched.simulator.results.metrics import Slo, Summary, latencies, summarise
from llumsched.simulator.results.result import SimulationResult
from llumsched.simulator.results.timeline import timeline_of
from llumsched.simulator.traces.trace import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureColumn:
    """A figure of the comparison table."""

    key: str
    label: str
    unit: str
    better: Literal["lower", "higher", "neither"]
    scale: float
    """From the unit of the summary to that of the table."""
    get: Callable[[Summary], float]


def _column(
    key: str,
    label: str,
    unit: str,
    get: Callable[[Summary], float],
    *,
    better: Literal["lower", "higher", "neither"] = "lower",
    scale: float = 1.0,
) -> FigureColumn:
    return FigureColumn(key=key, label=label, unit=unit, better=better, scale=scale, get=get)


# Less of a difference than this is none, and where nobody is further behind than this, nobody wins.
_AS_GOOD_AS = 0.01
_WORTH_A_WORD = 0.03

COLUMNS: Sequence[FigureColumn] = (
    _column("finished", "finished", "%", lambda s: s.num_finished / s.num_requests,
            better="higher", scale=100),
    _column("ttft_mean", "TTFT mean", "s", lambda s: s.ttft_s.mean),
    _column("ttft_p50", "TTFT P50", "s", lambda s: s.ttft_s.p50),
    _column("ttft_p99", "TTFT P99", "s", lambda s: s.ttft_s.p99),
    _column("tpot_mean", "TPOT mean", "ms", lambda s: s.tpot_s.mean, scale=1e3),
    _column("tpot_p99", "TPOT P99", "ms", lambda s: s.tpot_s.p99, scale=1e3),
    _column("gap_p50", "longest gap P50", "ms", lambda s: s.itl_max_s.p50, scale=1e3),
    _column("gap_p99", "longest gap P99", "ms", lambda s: s.itl_max_s.p99, scale=1e3),
    _column("gap_max", "longest gap max", "ms", lambda s: s.itl_max_s.max, scale=1e3),
    _column("e2e_mean", "E2E mean", "s", lambda s: s.e2e_s.mean),
    _column("e2e_p99", "E2E P99", "s", lambda s: s.e2e_s.p99),
    _column("queueing_p99", "queueing P99", "s", lambda s: s.queueing_s.p99),
    _column("output_tps", "output tokens", "1/s", lambda s: s.output_throughput_tps,
            better="higher"),
    _column("slo", "SLO kept", "%", lambda s: s.slo_attainment, better="higher", scale=100),
    _column("goodput", "goodput", "req/s", lambda s: s.goodput_rps, better="higher"),
    _column("preemptions", "preemptions", "", lambda s: float(s.num_preemptions)),
    _column("preemption_loss", "preemption loss", "s", lambda s: s.preemption_loss_s.mean),
    _column("prefix_hits", "prefix hits", "%", lambda s: s.prefix_hit_rate, better="higher",
            scale=100),
    _column("migrations", "migrations", "", lambda s: float(s.num_migrations), better="neither"),
    _column("pause_p50", "move's pause P50", "ms", lambda s: s.migration_downtime_s.p50,
            better="neither", scale=1e3),
    _column("pause_p99", "move's pause P99", "ms", lambda s: s.migration_downtime_s.p99,
            better="neither", scale=1e3),
    _column("pause_max", "move's pause max", "ms", lambda s: s.migration_downtime_s.max,
            better="neither", scale=1e3),
    _column("kv_usage", "KV use", "%", lambda s: s.kv_usage, better="neither", scale=100),
    _column("fragmentation", "fragmentation", "%", lambda s: s.fragmentation, scale=100),
    _column("mean_instances", "mean instances", "", lambda s: s.mean_instances),
    _column("token_hours", "hours / 1M tokens", "",
            lambda s: s.instance_hours_per_mtoken),
    _column("token_cost", "cost / 1M tokens", "", lambda s: s.cost_per_mtoken),
    _column("policy_failures", "policy failures", "", lambda s: s.num_policy_failures or math.nan,
            better="neither"),
)  # fmt: skip
"""Columns of the tables, in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A figure over the seeds."""

    mean: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of these values, those that are NaN left out."""
        known = [value for value in values if not math.isnan(value)]
        if not known:
            return cls(mean=math.nan, least=math.nan, greatest=math.nan)
        return cls(mean=sum(known) / len(known), least=min(known), greatest=max(known))


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Per-request latencies of one run, from which curves are drawn."""

    ttft_s: Floats
    tpot_s: Floats
    e2e_s: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One simulation, reduced to what is reported of it."""

    label: str
    seed: int
    summary: Summary
    samples: Samples
    warnings: tuple[str, ...]
    policy_failures: tuple[Failure, ...]
    is_complete: bool
    seed_matters: bool = True
    """True if the scheduler drew a random number."""
    timeline: Mapping[str, Any] | None = None
    """The time line as the report draws it, of the runs that are to be drawn."""

    def figures(self) -> dict[str, float]:
        """Every figure of the table, in its unit."""
        return {column.key: column.get(self.summary) * column.scale for column in COLUMNS}


def reduce_run(
    result: SimulationResult,
    *,
    label: str,
    seed: int,
    slo: Slo | None,
    draw: bool,
    hour_price: float | None = None,
) -> Run:
    """The figures of a result, and its time line if it is to be drawn.

    Args:
        hour_price: the price of an instance's hour, in any currency.
    """
    times = latencies(result)
    return Run(
        label=label,
        seed=seed,
        summary=summarise(result, slo, hour_price=hour_price),
        samples=Samples(ttft_s=times.ttft_s, tpot_s=times.tpot_s, e2e_s=times.e2e_s),
        warnings=result.warnings,
        policy_failures=result.policy_failures,
        is_complete=result.is_complete,
        seed_matters=result.uses_randomness,
        timeline=timeline_of(result) if draw else None,
    )


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each label, in the order of the labels' first runs."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.label, []).append(run)
    return grouped


def spreads(runs: Sequence[Run]) -> dict[str, dict[str, Spread]]:
    """Label -> figure -> its spread over the seeds."""
    return {
        label: {
            column.key: Spread.of(run.figures()[column.key] for run in group) for column in COLUMNS
        }
        for label, group in by_label(runs).items()
    }


def shown_columns(table: Mapping[str, Mapping[str, Spread]]) -> list[FigureColumn]:
    """The columns that have a value for anyone."""
    return [
        column
        for column in COLUMNS
        if any(not math.isnan(row[column.key].mean) for row in table.values())
    ]


def best_labels(column: FigureColumn, table: Mapping[str, Mapping[str, Spread]]) -> set[str]:
    """Labels with the best mean, or one within 1 % of it; none where all are within 3 %."""
    means = {
        label: row[column.key].mean
        for label, row in table.items()
        if not math.isnan(row[column.key].mean)
    }
    if column.better == "neither" or not means:
        return set()
    best, worst = min(means.values()), max(means.values())
    if math.isclose(best, worst, rel_tol=_WORTH_A_WORD):
        return set()
    if column.better == "higher":
        best = worst
    return {label for label, mean in means.items() if math.isclose(mean, best, rel_tol=_AS_GOOD_AS)}


def text_table(runs: Sequence[Run]) -> str:
    """The comparison for a terminal: a line a figure, a column a policy, `*` the best means.

    With several seeds, the least and the greatest value follow the mean in brackets. The legend of
    the stars is the last line, where there are any.
    """
    table = spreads(runs)
    header = ["", *(f"{label}  " for label in table)]
    lines = [
        [f"{column.label} ({column.unit})" if column.unit else column.label, *_cells(column, table)]
        for column in shown_columns(table)
    ]
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    shown = [
        "  ".join(
            # A header ends where its numbers do, and the star stands beyond.
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, *lines)
    ]
    if any(line.endswith("*") or "* " in line for line in shown):
        shown.append("* the best mean, and those within 1 % of it")
    return "\n".join(shown)


def _cells(column: FigureColumn, table: Mapping[str, Mapping[str, Spread]]) -> Iterator[str]:
    best = best_labels(column, table)
    spreads = [row[column.key] for row in table.values()]
    shown = iter(numbers([v for s in spreads for v in (s.mean, s.least, s.greatest)]))
    for label in table:
        cell, least, greatest = next(shown), next(shown), next(shown)
        if least != greatest:
            cell += f" [{least}, {greatest}]"
        yield f"{cell} *" if label in best else f"{cell}  "


def numbers(values: Sequence[float]) -> list[str]:
    """Numbers that stand together, with as many decimals each: three digits of the least of them,
    but for those that would be nothing beside the greatest."""
    sizes = [abs(value) for value in values if math.isfinite(value) and value]
    digits = 0
    if any(value % 1 for value in values if math.isfinite(value)):
        digits = min(_decimals(min(sizes)), _decimals(max(sizes)) + 2)
    return [f"{value:,.{digits}f}" if math.isfinite(value) else "-" for value in values]


def _decimals(size: float) -> int:
    """Decimals of a number above 0 that is to have three digits."""
    return max(0, min(6, 2 - math.floor(math.log10(size))))


def number(value: float) -> str:
    """Three significant digits without an exponent; `-` for none."""
    if not math.isfinite(value):
        return "-"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{_decimals(abs(value))}f}"


def as_json(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every run with its whole summary, for a file; NaN becomes null."""
    return [
        {
            "policy": run.label,
            "seed": run.seed,
            "is_complete": run.is_complete,
            "warnings": list(run.warnings),
            "policy_failures": [
                {
                    "policy": failure.first.policy,
                    "error": failure.first.error,
                    "count": failure.count,
                    "traceback": traceback_of(failure.first),
                }
                for failure in run.policy_failures
            ],
            "summary": _plain(dataclasses.asdict(run.summary)),
        }
        for run in runs
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
