"""A page readable on a phone and with ten policies: its sources, and in a browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from llumsched.simulator.results.report import _part, write_report
from tests.simulator.browsers import look_at, needs_a_browser
from tests.simulator.test_comparison import make_run


def rules(selector: str) -> str:
    """The declarations of a selector in the style sheet."""
    pattern = "^" + re.escape(selector) + r" \{(.*?)\}"
    found = re.search(pattern, _part("style.css"), re.DOTALL | re.MULTILINE)
    assert found is not None, selector
    return found[1]


def test_the_names_of_the_rows_stay_while_the_table_is_pushed_sideways() -> None:
    assert "position: sticky" in rules("th:first-child")
    assert "left: 0" in rules("th:first-child")


def test_a_spread_stands_below_its_number_so_headers_stand_above_theirs() -> None:
    """Beside it, with a fixed width, it pushed every column's header over its neighbour."""
    spread = rules("td .spread")
    assert "display: block" in spread
    assert "min-width" not in spread


def test_nothing_is_wider_than_a_phone() -> None:
    """A least width would push the page sideways, but for what scrolls within itself."""
    assert "minmax(min(100%" in rules(".charts")
    assert "minmax(0, 1fr)" in rules("main")
    assert "overflow-x: auto" in rules(".scroll")


def test_a_legend_shows_the_stroke_of_its_curve() -> None:
    script = _part("script.js")
    assert '"stroke-dasharray": dash' in script
    assert "dash: dashes(index)" in script


@pytest.mark.slow
@needs_a_browser
@pytest.mark.parametrize("num_policies", [2, 10])
def test_in_a_browser_nothing_is_wider_than_the_window_and_headers_stand_above_numbers(
    tmp_path: Path, num_policies: int
) -> None:
    path = tmp_path / "report.html"
    runs = [
        make_run(f"a_policy_{i}", seed, first_token_s=0.5 + i / 10 + seed / 50)
        for i in range(num_policies)
        for seed in (0, 1)
    ]
    write_report(path, runs, title="Ten", subtitle="policies", settings={"a" * 60: "b" * 90})

    async def check(page: Any) -> None:
        await page.wait_for_selector("#series svg")
        assert await page.locator("#cdfs svg").count() == 3
        assert await page.locator("#series svg").count() == 3
        assert await page.locator("#series polyline").count() == 3 * num_policies
        edges = await page.evaluate(
            """() => {
              const right = (cell) => cell.getBoundingClientRect().right;
              const rows = [...document.querySelectorAll("#comparison tr")];
              return rows.slice(0, 2).map((row) => [...row.children].slice(1).map(right));
            }"""
        )
        assert edges[0] == pytest.approx(edges[1])
        # The names of rows stay in sight at the far end of the table.
        left = await page.evaluate(
            """() => {
              const table = document.querySelector("#comparison");
              table.parentElement.scrollLeft = 1e6;
              const name = table.querySelector("tbody th").getBoundingClientRect();
              return name.left - table.parentElement.getBoundingClientRect().left;
            }"""
        )
        assert abs(left) < 2

    look_at(path, check)
