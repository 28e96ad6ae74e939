"""The published figures are whole, their systems can be built, the page says what it computes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from llumsched.config import build_bundle
from scripts.plots import Line, Panel, chart
from scripts.reproduction import experiments
from scripts.reproduction.experiments import MIXES, published
from scripts.reproduction.migration_downtime import downtimes_ms
from scripts.reproduction.page import page
from scripts.reproduction.report import Report
from scripts.reproduction.runs import Results, run_point
from scripts.reproduction.savings import instances_at, savings

AXES = ("context_tokens", "rates_rps", "cv", "thresholds")


def curves(data: Mapping[str, Any]) -> list[tuple[int, list[float]]]:
    """Every curve with the length of its axis."""
    found = []
    length = next((len(data[axis]) for axis in AXES if axis in data), None)
    for key, value in data.items():
        if isinstance(value, Mapping):
            inner = value if length is None else {**value, "cv": [0] * length}
            found += curves(inner)
        elif isinstance(value, list) and key not in AXES and length is not None:
            found.append((length, value))
    return found


def test_every_published_curve_has_a_value_for_each_point_of_its_axis() -> None:
    found = curves(published())
    assert len(found) > 60
    assert all(length == len(values) for length, values in found)
    assert set(published()["figure11"]) == set(MIXES)


def test_each_point_is_there_once_and_its_system_can_be_built() -> None:
    points = experiments.all_points()
    assert len(points) == len(set(points))
    for config in {point.config: point.policy() for point in points}.values():
        build_bundle(config)


def test_a_threshold_moves_both_ends_of_the_range() -> None:
    low, *_ = (p for p in experiments.figure15() if p.system == "llumnix")
    scaling: Any = build_bundle(low.policy()).scaling
    assert (scaling.low, scaling.high) == (5.0, 55.0)


def test_the_published_savings_are_those_the_paper_and_its_plot_give() -> None:
    theirs = published()["figure15"]
    base, other = (
        list(zip(theirs[system]["mean_instances"], theirs[system]["prefill_p99_s"], strict=True))
        for system in ("infaas", "llumnix")
    )
    unequal, equal, p99 = savings(base, other, theirs["thresholds"])
    assert float(unequal.split()[0]) == pytest.approx(theirs["cost_saving_percent"], abs=0.1)
    assert float(equal.split()[0]) == pytest.approx(20.6, abs=0.5)
    assert p99 == "4.59 s"


def test_instances_at_a_p99_lie_on_the_line_between_two_points() -> None:
    curve = [(10.0, 8.0), (12.0, 4.0)]
    assert instances_at(curve, 6.0) == (11.0, False)
    assert instances_at(curve, 9.0) == (10.0, True)
    assert instances_at(curve, 3.0) is None
    _, equal, _ = savings([(12.0, 3.0), (13.0, 2.0)], curve, (5, 25))
    assert equal == "none: no threshold reaches it"


def test_live_migration_stands_still_for_less_than_a_copy_of_everything() -> None:
    downtimes = downtimes_ms("a10-llama-7b", 2048)
    assert downtimes["migration_ms"] < downtimes["blocking_copy_ms"] / 10
    assert downtimes["recompute_ms"] == pytest.approx(442.7, abs=0.1)


def test_the_page_has_every_point_and_counts_those_that_are_far(tmp_path: Path) -> None:
    figures = dict.fromkeys(
        run_point(next(p for p in experiments.figure13()), seed=0, num_requests=3), 1.0
    )
    results = Results(tmp_path / "results.json")
    results.add_all((point, 0, figures) for point in experiments.all_points())
    text = page(Report(Results(tmp_path / "results.json")), num_seeds=1)
    assert "{{" not in text
    assert "nan" not in text
    (told,) = re.findall(r"Of (\d+) published values", text)
    assert int(told) == len(re.findall(r"→ [^|]*, (?:\*\*)?x ", text))


def test_what_is_kept_is_found_again(tmp_path: Path) -> None:
    point, other = list(experiments.figure14())[:2]
    Results(tmp_path / "r.json").add_all([(point, 1, {"x": 1.25}), (point, 0, {"x": 2.0})])
    results = Results(tmp_path / "r.json")
    assert results.has(point, 1)
    assert not results.has(other, 1)
    assert [figures["x"] for figures in results.of(point)] == [2.0, 1.25]


def test_a_chart_is_xml_with_a_line_for_each_curve() -> None:
    line = Line(name="a & b", points=[(1, 2, 1, 3), (2, 0, 0, 0), (3, 40, 30, 50)])
    svg = chart("y", [Panel(title="t", x_label="x", lines=[line])])
    texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.text]
    assert "a & b" in texts


def test_a_slower_engine_is_slower_and_nothing_else() -> None:
    fast, slow = (p for p in experiments.slower() if p.slowdown in (1.0, 1.2) and p.mix == "S-S"
                  and p.system == "infaas")  # fmt: skip
    figures = [run_point(p, seed=0, num_requests=20) for p in (fast, slow)]
    ratio = figures[1]["decode_mean_ms"] / figures[0]["decode_mean_ms"]
    assert ratio == pytest.approx(1.2, abs=0.05)
