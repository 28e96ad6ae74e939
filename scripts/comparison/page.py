"""`docs/comparison.md` and its chart, from the summaries of runs; the words are in `page.md`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llumsched.simulator.results.comparison import Spread, number
from llumsched.simulator.results.metrics import Summary
from scripts.comparison.runs import (
    DELAYS_S,
    POLICIES,
    RATED_INSTANCES,
    RATED_POLICY,
    RATED_SHARE,
    STATIONARY,
    Run,
)
from scripts.comparison.workloads import TUNED_ON, Workload
from scripts.pages import filled, table
from scripts.plots import Line, Panel, chart

TEMPLATE = Path(__file__).with_name("page.md")
JUDGED = "adaptive"
BETTER_BY = 0.25
EQUAL_TO = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A column of the tables; without `best` no value is better than another."""

    label: str
    get: Callable[[Summary], float]
    best: Callable[[Iterable[float]], float] | None = min
    is_judged: bool = False


FIGURES = (
    Figure(label="TTFT mean (s)", get=lambda s: s.ttft_s.mean, is_judged=True),
    Figure(label="TTFT P99 (s)", get=lambda s: s.ttft_s.p99, is_judged=True),
    Figure(label="TPOT mean (ms)", get=lambda s: s.tpot_s.mean * 1e3),
    Figure(label="TPOT P99 (ms)", get=lambda s: s.tpot_s.p99 * 1e3, is_judged=True),
    Figure(label="longest gap P99 (s)", get=lambda s: s.itl_max_s.p99, is_judged=True),
    Figure(label="E2E mean (s)", get=lambda s: s.e2e_s.mean),
    Figure(label="goodput (req/s)", get=lambda s: s.goodput_rps, best=max, is_judged=True),
    Figure(label="preemptions", get=lambda s: float(s.num_preemptions), best=None),
    Figure(label="moves", get=lambda s: float(s.num_migrations), best=None),
    Figure(label="pause P99 (s)", get=lambda s: s.migration_downtime_s.p99, best=None),
)
Group = tuple[Workload, float, int]
"""(workload, load, instances)"""


class Comparison:
    """The runs and what came out of each."""

    def __init__(
        self, compared: Sequence[Run], stale: Sequence[Run], summaries: Mapping[Run, Summary]
    ) -> None:
        self._compared = compared
        self._stale = stale
        self._summaries = summaries
        self._spreads: dict[Group, dict[str, list[Spread]]] = {}
        for group in dict.fromkeys(map(_group, compared)):
            runs = [run for run in compared if _group(run) == group]
            self._spreads[group] = {
                policy: [
                    Spread.of(figure.get(summaries[r]) for r in runs if r.policy == policy)
                    for figure in FIGURES
                ]
                for policy in dict.fromkeys(run.policy for run in runs)
            }

    def page(self, *, num_seeds: int) -> str:
        """The whole page."""
        workloads = list(dict.fromkeys(run.workload for run in self._compared))
        parts = {
            "options": self._options(num_seeds),
            "rated_policy": RATED_POLICY,
            "rated_share": f"{RATED_SHARE:.0%}",
            "rated_instances": str(RATED_INSTANCES),
            "tuned": ", ".join(TUNED_ON),
            "held_out": ", ".join(w.name for w in workloads if w.name not in TUNED_ON),
            "seeds": "one seed" if num_seeds == 1 else f"{num_seeds} seeds",
            "verdict": self._verdict(),
            "workloads": "\n\n".join(self._section(workload) for workload in workloads),
            "staleness": self._staleness_table(),
        }
        return filled(TEMPLATE, parts)

    def staleness_chart(self) -> str:
        """P99 TTFT by delay."""
        lines = []
        for policy in dict.fromkeys(run.policy for run in self._stale):
            spreads = [(1e3 * delay_s, self._p99(policy, delay_s)) for delay_s in DELAYS_S]
            points = [(x, s.mean, s.least, s.greatest) for x, s in spreads]
            lines.append(Line(name=policy, points=points))
        panel = Panel(title="chat", x_label="delay of a report (ms)", lines=lines)
        return chart("P99 TTFT (s)", [panel], columns=1)

    def _options(self, num_seeds: int) -> str:
        loads = dict.fromkeys(f"{run.load:g}" for run in self._compared)
        sizes = dict.fromkeys(str(run.num_instances) for run in self._compared)
        return f"--seeds {num_seeds} --loads {','.join(loads)} --instances {','.join(sizes)}"

    def _verdict(self) -> str:
        judged = [(i, figure) for i, figure in enumerate(FIGURES) if figure.is_judged]
        labels = [figure.label for _, figure in judged]
        lines = []
        num_met = num_all = num_gained = 0
        for (workload, load, num_instances), rows in self._spreads.items():
            cells = []
            for index, figure in judged:
                best = _best(figure, index, rows)
                met = _is_within(figure, rows[JUDGED][index], rows[best][index])
                num_met, num_all = num_met + met, num_all + 1
                if best == JUDGED:
                    cells.append("best")
                else:
                    ratio = rows[JUDGED][index].mean / rows[best][index].mean
                    words = "within" if met else "**missed**"
                    cells.append(f"{words}: {ratio:.2f} x `{best}`")
            tuned = "" if workload.name in TUNED_ON else " (held out)"
            cells.append(_gain(rows))
            num_gained += cells[-1].startswith("**")
            lines.append([f"{workload.name}{tuned}", f"{load:.0%}", str(num_instances), *cells])
        columns = ["traffic", "load", "instances", *labels, "against no migration"]
        return (
            f"{table(columns, lines)}\n\n"
            f"`{JUDGED}` is the best, or within the seeds' spread of the best, in {num_met} of"
            f" {num_all} cells. Ranges are wide, since every seed is other traffic: cells that are"
            " *within* are not shown to be equal. Over the best policy without migration it gains"
            f" {BETTER_BY:.0%} or more in P99 TTFT or longest gap in {num_gained} of"
            f" {len(self._spreads)} rows."
        )

    def _section(self, workload: Workload) -> str:
        slo = workload.slo
        words = (
            f"{workload.num_requests:,} requests of `{workload.source}`, capacity"
            f" {self._capacity_rps(workload):g} requests/s of {RATED_INSTANCES} x"
            f" `{workload.hardware}`; bounds: TTFT {slo.ttft_s:g} s, TPOT {slo.tpot_s:g} s."
        )
        tables = [
            f"**{load:.0%} of capacity, {num_instances} instances**\n\n" + self._table(rows)
            for (of, load, num_instances), rows in self._spreads.items()
            if of == workload
        ]
        return "\n\n".join([f"## {workload.name.capitalize()}", words, *tables])

    def _capacity_rps(self, workload: Workload) -> float:
        return next(run.capacity_rps for run in self._compared if run.workload == workload)

    def _table(self, rows: Mapping[str, Sequence[Spread]]) -> str:
        best = [
            None if figure.best is None else number(rows[_best(figure, index, rows)][index].mean)
            for index, figure in enumerate(FIGURES)
        ]
        lines = [
            [f"`{policy}`", *(_cell(spread, best[index]) for index, spread in enumerate(row))]
            for policy, row in rows.items()
        ]
        return table(["policy", *(figure.label for figure in FIGURES)], lines)

    def _staleness_table(self) -> str:
        lines = [
            [f"`{policy}`", *(_cell(self._p99(policy, delay_s), None) for delay_s in DELAYS_S)]
            for policy in dict.fromkeys(run.policy for run in self._stale)
        ]
        return table(["TTFT P99 (s)", *(f"{1e3 * d:g} ms" for d in DELAYS_S)], lines)

    def _p99(self, policy: str, delay_s: float) -> Spread:
        return Spread.of(
            self._summaries[run].ttft_s.p99
            for run in self._stale
            if run.policy == policy and run.report_delay_s == delay_s
        )


def _group(run: Run) -> Group:
    return run.workload, run.load, run.num_instances


def _best(
    figure: Figure,
    index: int,
    rows: Mapping[str, Sequence[Spread]],
    among: Sequence[str] = POLICIES,
) -> str:
    choose = figure.best or min
    known = {p: rows[p][index].mean for p in among if p in rows}
    known = {p: mean for p, mean in known.items() if mean == mean}
    return next(p for p, mean in known.items() if mean == choose(known.values()))


def _is_within(figure: Figure, own: Spread, best: Spread) -> bool:
    """True if the seeds' ranges of the two overlap, or all but: by one percent."""
    if figure.best is max:
        return own.greatest >= best.least * (1 - EQUAL_TO)
    return own.least <= best.greatest * (1 + EQUAL_TO)


def _gain(rows: Mapping[str, Sequence[Spread]]) -> str:
    """The larger of the gains in P99 TTFT and longest gap over the best without migration."""
    gains = {}
    for index, figure in enumerate(FIGURES):
        if figure.label in ("TTFT P99 (s)", "longest gap P99 (s)"):
            best = _best(figure, index, rows, STATIONARY)
            gains[figure.label] = 1 - rows[JUDGED][index].mean / rows[best][index].mean
    label = max(gains, key=lambda name: gains[name])
    shown = f"{label.rsplit(' ', 1)[0]} {-gains[label]:+.0%}"
    return f"**{shown}**" if gains[label] >= BETTER_BY else shown


def _cell(spread: Spread, best: str | None) -> str:
    mean, least, greatest = map(number, (spread.mean, spread.least, spread.greatest))
    shown = f"**{mean}**" if mean == best else mean
    return shown if least == greatest else f"{shown} [{least}, {greatest}]"
