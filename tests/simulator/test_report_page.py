"""What makes the page readable on a phone and with ten policies, as far as its sources tell it."""

from __future__ import annotations

import re

from llumsched.simulator.results.report import _part


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
