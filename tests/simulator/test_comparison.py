"""Policies side by side: who is best, how far the seeds spread, what the page gets to draw."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llumsched.simulator.results.comparison import (
    COLUMNS,
    Run,
    as_json,
    best_labels,
    number,
    numbers,
    reduce_run,
    spreads,
    text_table,
)
from llumsched.simulator.results.metrics import Slo
from llumsched.simulator.results.report import report_data, write_report
from tests.simulator.results import make_result


def make_run(label: str, seed: int, *, first_token_s: float = 1.0, draw: bool = True) -> Run:
    result = make_result(first_token_s=np.array([first_token_s, 1.5, np.nan, 4.0]))
    return reduce_run(result, label=label, seed=seed, slo=Slo(ttft_s=1.0), draw=draw)


RUNS = [
    make_run("latency", 0, first_token_s=0.6),
    make_run("round_robin", 0, first_token_s=2.0),
    make_run("latency", 1, first_token_s=0.8),
]


def test_spreads_are_over_the_seeds_of_a_policy() -> None:
    table = spreads(RUNS)
    ttft = table["latency"]["ttft_mean"]
    assert (ttft.mean, ttft.least, ttft.greatest) == pytest.approx((0.6, 0.55, 0.65))
    assert table["round_robin"]["ttft_mean"].least == 1.25


def test_the_best_is_lowest_for_times_and_highest_for_goodput() -> None:
    table = spreads(RUNS)
    columns = {column.key: column for column in COLUMNS}
    assert best_labels(columns["ttft_mean"], table) == {"latency"}
    assert best_labels(columns["goodput"], table) == {"latency"}
    assert best_labels(columns["migrations"], table) == set()
    assert best_labels(columns["mean_instances"], table) == set()


def test_who_is_as_good_as_the_best_is_best_too_unless_all_are() -> None:
    columns = {column.key: column for column in COLUMNS}
    runs = [
        make_run(label, 0, first_token_s=seconds)
        for label, seconds in (("a", 1.0), ("b", 1.001), ("c", 2.0))
    ]
    assert best_labels(columns["ttft_mean"], spreads(runs)) == {"a", "b"}
    assert best_labels(columns["ttft_mean"], spreads(runs[:2])) == set()


def test_the_table_shows_spread_and_marks_the_best() -> None:
    lines = {line.split("  ")[0]: line for line in text_table(RUNS).splitlines()}
    assert "0.600 [0.550, 0.650] *" in lines["TTFT mean (s)"]
    assert "1.25" in lines["TTFT mean (s)"]


def test_what_a_stream_suffers_is_in_the_table() -> None:
    """A stall, an eviction and a move are shown beside the means that hide them."""
    text = text_table(RUNS)
    for label in (
        *(f"longest gap {which} (ms)" for which in ("P50", "P99", "max")),
        "preemptions",
        *(f"move's pause {which} (ms)" for which in ("P50", "P99", "max")),
    ):
        assert f"\n{label} " in text
    run = RUNS[0].figures()
    assert (run["gap_max"], run["preemptions"], run["pause_max"]) == pytest.approx((600, 3, 20))


def test_numbers_have_three_digits_and_no_exponent() -> None:
    values = (0.0, 0.01234, 1.0, 45.678, 12345.6, float("nan"))
    assert [number(value) for value in values] == ["0", "0.0123", "1.00", "45.7", "12,346", "-"]


def test_the_json_has_no_nan() -> None:
    text = json.dumps(as_json(RUNS), allow_nan=False)
    assert json.loads(text)[0]["summary"]["ttft_s"]["count"] == 2


def test_the_page_gets_the_time_line_of_the_first_seed() -> None:
    data = report_data(RUNS, subtitle="", settings={}, notes=())
    line = data["timelines"]["latency"]
    assert (line["seed"], line["instances"], line["num_migrations"]) == (0, ["i0", "i1"], 1)
    assert line["migrations"] == [[1.2, 2.0, 0, 1, 0, 7, 2, 20.0]]
    assert [v for v in line["used"][0] if v is not None] == [0.5, 0.6]
    series = line["series"]
    assert {len(values) for values in series.values()} == {80}
    # Requests arrived at 0, 1 and 3 s; the second instance came when the line had ended.
    assert [v for v in series["ttft_s"] if v is not None] == [0.6, 0.5, 1.0]
    assert set(series["instances"]) == {1.0}
    assert data["warnings"][0] == "every policy: seed 0 was cut short: its figures are partial"


class Page(html.parser.HTMLParser):
    """Collects every attribute that would make a browser fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.data = ""
        self._in_data = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.fetched += [f"{tag} {name}" for name in ("src", "href") if name in named]
        self._in_data = named.get("id") == "data"

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data += data


def test_the_page_is_one_file_that_fetches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(
        path,
        RUNS,
        title="<b> & co",
        subtitle="</script><script>alert(1)</script>",
        settings={"hardware": "test"},
        notes=["a note"],
    )
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.fetched == []
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|%[A-Z]+%", text)
    assert "<title>&lt;b&gt; &amp; co</title>" in text
    content: dict[str, Any] = json.loads(page.data)
    assert content["subtitle"] == "</script><script>alert(1)</script>"
    assert content["settings"] == [["hardware", "test"]]


def test_numbers_that_stand_together_have_as_many_decimals() -> None:
    assert numbers([10.0, 9.876, float("nan")]) == ["10.00", "9.88", "-"]
    assert numbers([98.0, 0.0]) == ["98", "0"]
    assert numbers([1060.4, 31.27]) == ["1,060.4", "31.3"]
    # What is nothing beside the greatest need not be told to the microsecond.
    assert numbers([177.0, 0.000123]) == ["177.00", "0.00"]


def test_a_star_has_a_legend_and_hardly_any_difference_has_no_star() -> None:
    runs = [
        make_run(label, 0, first_token_s=seconds)
        for label, seconds in (("a", 0.9), ("b", 0.901), ("c", 0.905))
    ]
    assert "*" not in text_table(runs)
    assert text_table(RUNS).splitlines()[-1] == "* the best mean, and those within 1 % of it"
