"""`docs/reproduction.md` and its charts, from published and simulated figures.

Every number in the page is computed here. The prose says why figures differ, and names where that
can be read; it states no result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llumsched.simulator.engines.cost import StepCost
from llumsched.simulator.hardware.spec import load_hardware
from llumsched.simulator.kernel import PS_PER_S
from llumsched.simulator.results.comparison import Spread, number
from llumsched.simulator.traces.generators import GeneratorOptions, generate
from llumsched.simulator.traces.lengths import PAPER_NUM_REQUESTS
from scripts.pages import table
from scripts.plots import PUBLISHED, Line, Panel, chart
from scripts.reproduction import experiments
from scripts.reproduction.experiments import OURS, ROOM_FIRST, Point, published
from scripts.reproduction.migration_downtime import downtimes_ms
from scripts.reproduction.runs import Results
from scripts.reproduction.savings import savings

FAR = 0.3
# The goal of the last section.
BETTER_BY, NUM_BETTER, NOISE = 0.2, 4, 0.02
NAMES = {
    "infaas": "INFaaS++",
    "llumnix": "Llumnix",
    "round_robin": "round-robin",
    "base": "base",
    ROOM_FIRST: "Llumnix, room first",
    OURS: "ours",
}
_METRICS = {
    "prefill_p99_s": "prefill P99 (s)",
    "prefill_mean_s": "prefill mean (s)",
    "request_mean_s": "request mean (s)",
    "decode_p99_ms": "decode P99 (ms)",
    "decode_mean_ms": "decode mean (ms)",
    "preemption_loss_s": "preemption loss (s)",
}
_HIGH = {
    "high_request_mean_s": "high: request mean (s)",
    "high_prefill_p99_s": "high: prefill P99 (s)",
    "high_decode_mean_ms": "high: decode mean (ms)",
    "high_decode_p99_ms": "high: decode P99 (ms)",
    "normal_request_mean_s": "normal: request mean (s)",
}
_SCALED = {"mean_instances": "mean instances", "prefill_p99_s": "prefill P99 (s)"}


class Report:
    """Tables and charts from results."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self.num_points = 0
        """Published values that have a simulated one beside them."""
        self.num_far = 0

    def spread(self, point: Point, metric: str) -> Spread:
        """A figure of a point over the seeds."""
        return Spread.of(figures[metric] for figures in self._results.of(point))

    # ---- tables ---------------------------------------------------------------------------

    def figure10(self) -> str:
        """Downtime by length of context and method."""
        data = published()["figure10"]
        rows = []
        for hardware in ("a10-llama-7b", "a10-llama-30b"):
            for i, context in enumerate(data["context_tokens"]):
                ours = downtimes_ms(hardware, context)
                cells = [
                    self._cell(values[i], Spread.of([ours[method]]))
                    for method, values in data[hardware].items()
                ]
                rows.append([hardware, f"{context:,}", *cells])
        return table(
            ["model", "context", "live migration (ms)", "blocking copy (ms)", "recompute (ms)"],
            rows,
        )

    def figure11(self, mix: str) -> str:
        """One mix: a row a rate and system."""
        data = published()["figure11"][mix]
        rows = []
        for point in experiments.figure11():
            if point.mix == mix and point.system in data:
                index = data["rates_rps"].index(point.rate_rps)
                rows.append(
                    [
                        f"{point.rate_rps:g}",
                        NAMES[point.system],
                        *self._cells(point, data[point.system], index, _METRICS),
                    ]
                )
        return table(["requests/s", "system", *_METRICS.values()], rows)

    def gains(self) -> str:
        """INFaaS++ by Llumnix: how many times shorter, published and simulated."""
        metrics = ("prefill_p99_s", "prefill_mean_s", "request_mean_s", "decode_p99_ms")
        rows = []
        for mix in experiments.MIXES:
            data = published()["figure11"][mix]
            points = {(p.rate_rps, p.system): p for p in experiments.figure11() if p.mix == mix}
            for index, rate in enumerate(data["rates_rps"]):
                cells = []
                for metric in metrics:
                    theirs = data["infaas"][metric][index] / data["llumnix"][metric][index]
                    ours = self._ratio(points[rate, "infaas"], points[rate, "llumnix"], metric)
                    cells.append(f"{number(theirs)} → {number(ours)}")
                rows.append([mix, f"{rate:g}", *cells])
        return table(["mix", "requests/s", *(_METRICS[metric] for metric in metrics)], rows)

    def slower(self) -> str:
        """Prefill P99 with every step longer."""
        points = list(experiments.slower())
        rows = []
        for mix in experiments.MIXES:
            for system in ("infaas", "llumnix"):
                chosen = [p for p in points if p.mix == mix and p.system == system]
                cells = [self._plain(p, "prefill_p99_s") for p in chosen]
                data = published()["figure11"][mix]
                there = data[system]["prefill_p99_s"][2]
                rows.append([mix, f"{chosen[0].rate_rps:g}", NAMES[system], number(there), *cells])
        steps = [f"ours, steps x {factor:g}" for factor in experiments.SLOWER]
        return table(["mix", "requests/s", "system", "published", *steps], rows)

    def booting(self) -> str:
        """Auto-scaling with instances that start sooner."""
        data = published()["figure14"]["poisson"]
        rows = []
        for system in ("infaas", "llumnix"):
            chosen = [p for p in experiments.booting() if p.system == system]
            there = number(data[system]["prefill_p99_s"][2])
            cells = [self._plain(p, "prefill_p99_s") for p in chosen]
            rows.append([f"{chosen[0].rate_rps:g}", NAMES[system], there, *cells])
        boots = [f"ours, {boot_s:g} s to start" for boot_s in experiments.BOOTS_S]
        return table(["requests/s", "system", "published", *boots], rows)

    def num_seeds(self, points: Sequence[Point]) -> int:
        """The seeds that each of these points has."""
        return min(len(self._results.of(point)) for point in points)

    def better(self, points: Sequence[Point]) -> str:
        """The paper's rule and ours side by side."""
        rows = []
        for rule in (p for p in points if p.system == "llumnix"):
            own = self._ours(points, rule)
            cells = []
            for metric in _METRICS:
                before, after = self._mean(rule, metric), self._mean(own, metric)
                change = f" ({self._change(rule, own, metric)})" if before else ""
                cells.append(f"{number(before)} → {number(after)}{change}")
            rows.append([rule.mix, f"{rule.setting:g}", *cells])
        return table(["mix", "requests/s", *_METRICS.values()], rows)

    def _change(self, rule: Point, own: Point, metric: str) -> str:
        """Of the mean, and of the seeds with the least and the greatest; in percent."""
        change = 100 * (self._ratio(own, rule, metric) - 1)
        pairs = zip(self._results.of(rule), self._results.of(own), strict=True)
        by_seed = [100 * (b[metric] / a[metric] - 1) for a, b in pairs if a[metric]]
        spread = f" [{min(by_seed):+.0f}, {max(by_seed):+.0f}]" if len(by_seed) > 1 else ""
        return f"{change:+.0f} %{spread}"

    def better_goal(self, points: Sequence[Point]) -> str:
        """The goal against the paper's rule, and whether ours reaches it."""
        return (
            f"The goal is P99 prefill at least {BETTER_BY:.0%} shorter on {NUM_BETTER} of the"
            f" {len(experiments.MIXES)} mixes with nothing else more than {NOISE:.0%} worse."
            f" {self._judged(points)}"
        )

    def beyond_goal(self) -> str:
        """True if ours reaches the same goal at each of the higher rates."""
        told = []
        for factor in experiments.BEYOND:
            judged = self._judged(list(experiments.beyond([factor])))
            told.append(f"{factor - 1:.0%} beyond the paper's rates. {judged}")
        return "The same goal at these rates.\n\n" + "\n".join(f"- {line}" for line in told)

    def _judged(self, points: Sequence[Point]) -> str:
        rules = [p for p in points if p.system == "llumnix"]
        better, worse = [], []
        for rule in rules:
            own = self._ours(points, rule)
            change = {m: self._ratio(own, rule, m) for m in _METRICS if self._mean(rule, m)}
            if change["prefill_p99_s"] <= 1 - BETTER_BY:
                better.append(rule.mix)
            worse += [
                f"{_METRICS[metric]} on {rule.mix}"
                for metric, ratio in change.items()
                if ratio > 1 + NOISE
            ]
        reached = len(better) >= NUM_BETTER and not worse
        return (
            f"Shorter by that: {', '.join(better) or 'none'}. Worse by that:"
            f" {', '.join(worse) or 'nothing'}. It is {'met' if reached else '**missed**'}."
        )

    def floors(self, points: Sequence[Point]) -> str:
        """P99 of what the prompts take to compute alone, the least that a policy can come to, and
        how far below the paper's rule that is."""
        rules = {point.mix: point for point in points if point.system == "llumnix"}
        hardware = load_hardware(experiments.HARDWARE)
        told = []
        for mix in experiments.MIXES:
            made = GeneratorOptions(rate_rps=1.0, num_requests=PAPER_NUM_REQUESTS)
            lengths = generate(mix, made).num_prompt_tokens
            cost = StepCost(hardware.step, int(lengths.max()))
            times_s = [
                cost.step(num_prefill_tokens=n, twice_prefill_pairs=n * n, num_decodes=0,
                          num_kv_tokens=0) / PS_PER_S
                for n in lengths.tolist()
            ]  # fmt: skip
            least_s = float(np.percentile(times_s, 99))
            below = 1 - least_s / self._mean(rules[mix], "prefill_p99_s")
            told.append(f"{number(least_s)} s on {mix} ({below:.0%} below the paper's rule)")
        return ", ".join(told)

    def figure13(self) -> str:
        """Priorities: a row a CV and system."""
        data = published()["figure13"]
        rows = []
        for point in experiments.figure13():
            if point.system in data:
                index = data["cv"].index(point.cv)
                cells = list(self._cells(point, data[point.system], index, _HIGH))
            else:
                cells = [self._plain(point, metric) for metric in _HIGH]
            rows.append([f"{point.cv:g}", NAMES[point.system], *cells])
        return table(["CV", "system", *_HIGH.values()], rows)

    def figure14(self, figure: str, axis: str, data: Mapping[str, Any]) -> str:
        """Auto-scaling: a row a setting and system."""
        rows = []
        indices: dict[str, int] = {}
        points = [*experiments.figure14(), *experiments.figure15()]
        for point in (p for p in points if p.figure == figure and p.system in data):
            index = indices.get(point.system, 0)
            indices[point.system] = index + 1
            cells = self._cells(point, data[point.system], index, _SCALED)
            rows.append([f"{point.setting:g}", NAMES[point.system], *cells])
        return table([axis, "system", *_SCALED.values()], rows)

    def cost(self) -> str:
        """Instances that Llumnix, and ours, save: both ways, published and simulated."""
        theirs = published()["figure15"]
        thresholds = theirs["thresholds"]
        curves: dict[str, list[tuple[float, float]]] = {}
        for point in experiments.figure15():
            pair = (self.spread(point, "mean_instances"), self.spread(point, "prefill_p99_s"))
            curves.setdefault(point.system, []).append((pair[0].mean, pair[1].mean))
        there = {
            system: list(
                zip(theirs[system]["mean_instances"], theirs[system]["prefill_p99_s"], strict=True)
            )
            for system in ("infaas", "llumnix")
        }
        rows = [
            [what, *savings(base, other, thresholds)]
            for what, base, other in (
                ("Llumnix, published", there["infaas"], there["llumnix"]),
                ("Llumnix, simulated", curves["infaas"], curves["llumnix"]),
                ("ours, simulated", curves["infaas"], curves[OURS]),
            )
        ]
        return table(
            ["", "at unequal P99 (as in the abstract)", "at equal P99", "the P99 that is equal"],
            rows,
        )

    # ---- charts ---------------------------------------------------------------------------

    def chart11(self) -> str:
        """Prefill P99 by rate, a panel a mix."""
        panels = []
        points = [*experiments.figure11(), *experiments.beyond()]
        for mix in experiments.MIXES:
            data = published()["figure11"][mix]
            lines = []
            for system in NAMES:
                chosen = [p for p in points if p.mix == mix and p.system == system]
                if chosen:
                    lines.append(self._line(NAMES[system], chosen, "prefill_p99_s"))
                if system in data:
                    values = data[system]["prefill_p99_s"]
                    lines.append(_published_line(system, data["rates_rps"], values))
            panels.append(Panel(title=mix, x_label="requests/s", lines=lines))
        return chart("prefill P99 (s), the band from the least to the greatest seed", panels)

    def chart15(self) -> str:
        """Prefill P99 against mean instances."""
        data = published()["figure15"]
        lines = []
        for system in ("infaas", "llumnix", OURS):
            chosen = [p for p in experiments.figure15() if p.system == system]
            pairs = [
                (self.spread(p, "mean_instances").mean, self.spread(p, "prefill_p99_s"))
                for p in chosen
            ]
            points = [(x, s.mean, s.least, s.greatest) for x, s in sorted(pairs, key=_first)]
            lines.append(Line(name=NAMES[system], points=points))
            if system in data:
                curve = data[system]
                lines.append(
                    _published_line(system, curve["mean_instances"], curve["prefill_p99_s"])
                )
        panel = Panel(title="threshold sweep", x_label="mean instances", lines=lines)
        return chart("prefill P99 (s)", [panel], columns=1)

    def _line(self, name: str, points: Sequence[Point], metric: str) -> Line:
        spreads = [(p.setting, self.spread(p, metric)) for p in points]
        return Line(name=name, points=[(x, s.mean, s.least, s.greatest) for x, s in spreads])

    # ---- cells ----------------------------------------------------------------------------

    def _cells(
        self, point: Point, data: Mapping[str, Any], index: int, metrics: Mapping[str, str]
    ) -> Iterator[str]:
        for metric in metrics:
            yield self._cell(data[metric][index], self.spread(point, metric))

    def _cell(self, there: float, ours: Spread) -> str:
        """Published → ours [least, greatest], ratio."""
        self.num_points += 1
        ratio = ours.mean / there if there else float("nan")
        is_far = not abs(ratio - 1) <= FAR
        self.num_far += is_far
        shown = f"**x {number(ratio)}**" if is_far else f"x {number(ratio)}"
        return f"{number(there)} → {_shown(ours)}, {shown}"

    def _ours(self, points: Sequence[Point], rule: Point) -> Point:
        """Our system where the paper's rule is at `rule`."""
        return next(
            p for p in points
            if p.system == OURS and (p.mix, p.setting) == (rule.mix, rule.setting)
        )  # fmt: skip

    def _mean(self, point: Point, metric: str) -> float:
        return self.spread(point, metric).mean

    def _plain(self, point: Point, metric: str) -> str:
        return _shown(self.spread(point, metric))

    def _ratio(self, before: Point, after: Point, metric: str) -> float:
        return self._mean(before, metric) / self._mean(after, metric)


def _first(pair: tuple[float, Spread]) -> float:
    return pair[0]


def _shown(spread: Spread) -> str:
    least, greatest = number(spread.least), number(spread.greatest)
    return (
        number(spread.mean)
        if least == greatest
        else (f"{number(spread.mean)} [{least}, {greatest}]")
    )


def _published_line(system: str, xs: Sequence[float], values: Sequence[float]) -> Line:
    points = [(float(x), v, v, v) for x, v in zip(xs, values, strict=True)]
    return Line(name=f"{NAMES[system]}{PUBLISHED}", points=points, is_dashed=True)
