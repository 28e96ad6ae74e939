"""`docs/comparison.md` and its chart, from the summaries of runs; the words are in `page.md`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llumsched.simulator.results.comparison import Spread, number
from llumsched.simulator.results.metrics import Summary
from scripts.comparison.runs import DELAYS_S, POLICIES, RATED_POLICY, RATED_SHARE, Run, Workload
from scripts.plots import Line, Panel, chart

TEMPLATE = Path(__file__).with_name("page.md")
CHARTED = ("latency", "late_binding", "prefix_aware", "infaas", "least_requests", "round_robin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A column of the tables; without `best` no value is better than another."""

    label: str
    get: Callable[[Summary], float]
    best: Callable[[Iterable[float]], float] | None = min


def _cost_s(summary: Summary) -> float:
    good = summary.goodput_rps
    return summary.mean_instances / good if good > 0 else float("nan")


FIGURES = (
    Figure(label="TTFT mean (s)", get=lambda s: s.ttft_s.mean),
    Figure(label="TTFT P99 (s)", get=lambda s: s.ttft_s.p99),
    Figure(label="TPOT mean (ms)", get=lambda s: s.tpot_s.mean * 1e3),
    Figure(label="TPOT P99 (ms)", get=lambda s: s.tpot_s.p99 * 1e3),
    Figure(label="goodput (req/s)", get=lambda s: s.goodput_rps, best=max),
    Figure(label="cost (s)", get=_cost_s),
    Figure(label="finished (%)", get=lambda s: 100 * s.num_finished / s.num_requests, best=max),
    Figure(label="migrations", get=lambda s: float(s.num_migrations), best=None),
)


class Comparison:
    """The runs and what came out of each."""

    def __init__(
        self, compared: Sequence[Run], stale: Sequence[Run], summaries: Mapping[Run, Summary]
    ) -> None:
        self._compared = compared
        self._stale = stale
        self._summaries = summaries

    def page(self, *, num_seeds: int) -> str:
        """The whole page."""
        workloads = list(dict.fromkeys(run.workload for run in self._compared))
        parts = {
            "rated_policy": RATED_POLICY,
            "rated_share": f"{RATED_SHARE:.0%}",
            "seeds": "one seed" if num_seeds == 1 else f"{num_seeds} seeds",
            "workloads": "\n\n".join(self._section(workload) for workload in workloads),
            "staleness": "\n".join(self._staleness_table()),
        }
        text = TEMPLATE.read_text(encoding="utf-8")
        for name, part in parts.items():
            text = text.replace("{{" + name + "}}", part)
        assert "{{" not in text, "page.md has a place that nothing fills"
        return text

    def staleness_chart(self) -> str:
        """P99 TTFT by delay."""
        lines = []
        for policy in CHARTED:
            spreads = [(1e3 * delay_s, self._p99(policy, delay_s)) for delay_s in DELAYS_S]
            points = [(x, s.mean, s.least, s.greatest) for x, s in spreads]
            lines.append(Line(name=policy, points=points))
        panel = Panel(title="chat", x_label="delay of a report (ms)", lines=lines)
        return chart("P99 TTFT (s)", [panel], columns=1)

    def _section(self, workload: Workload) -> str:
        slo = workload.slo
        words = (
            f"The first {workload.num_requests:,} requests of `{workload.path}` at"
            f" {self._rate_rps(workload):g} requests/s on {workload.num_instances} x"
            f" `{workload.hardware}`; bounds: TTFT {slo.ttft_s:g} s, TPOT {slo.tpot_s:g} s."
        )
        title = f"## {workload.name.capitalize()}"
        return "\n\n".join([title, words, "\n".join(self._table(workload))])

    def _rate_rps(self, workload: Workload) -> float:
        return next(run.rate_rps for run in self._compared if run.workload == workload)

    def _table(self, workload: Workload) -> Iterator[str]:
        runs = [run for run in self._compared if run.workload == workload]
        spreads = {
            policy: [
                Spread.of(figure.get(self._summaries[r]) for r in runs if r.policy == policy)
                for figure in FIGURES
            ]
            for policy in POLICIES
        }
        best = [
            None if figure.best is None else number(figure.best(_means(spreads.values(), index)))
            for index, figure in enumerate(FIGURES)
        ]
        yield "| policy | " + " | ".join(figure.label for figure in FIGURES) + " |"
        yield "| --- " * (len(FIGURES) + 1) + "|"
        for policy, row in spreads.items():
            cells = [_cell(spread, best[index]) for index, spread in enumerate(row)]
            yield f"| `{policy}` | " + " | ".join(cells) + " |"

    def _staleness_table(self) -> Iterator[str]:
        yield "| TTFT P99 (s) | " + " | ".join(f"{1e3 * d:g} ms" for d in DELAYS_S) + " |"
        yield "| --- " * (len(DELAYS_S) + 1) + "|"
        for policy in POLICIES:
            cells = [_cell(self._p99(policy, delay_s), None) for delay_s in DELAYS_S]
            yield f"| `{policy}` | " + " | ".join(cells) + " |"

    def _p99(self, policy: str, delay_s: float) -> Spread:
        return Spread.of(
            self._summaries[run].ttft_s.p99
            for run in self._stale
            if run.policy == policy and run.report_delay_s == delay_s
        )


def _means(rows: Iterable[Sequence[Spread]], index: int) -> list[float]:
    known = [row[index].mean for row in rows]
    return [mean for mean in known if mean == mean]


def _cell(spread: Spread, best: str | None) -> str:
    mean, least, greatest = map(number, (spread.mean, spread.least, spread.greatest))
    shown = f"**{mean}**" if mean == best else mean
    return shown if least == greatest else f"{shown} [{least}, {greatest}]"
