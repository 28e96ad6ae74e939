"""The page of a sweep: what is along the axis, what is a line, and how it looks in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llumsched import cli
from tests.simulator.browsers import look_at, needs_a_browser

TRAFFIC = ["S-S", "--rate", "20", "--requests", "30", "--quiet"]


def made(tmp_path: Path, *arguments: str) -> Path:
    path = tmp_path / "sweep.html"
    assert cli.main(["sweep", *TRAFFIC, *arguments, "--report", str(path)]) == 0
    return path


def data_of(path: Path) -> dict[str, Any]:
    found = re.search(r'<script id="data"[^>]*>(.*?)</script>', path.read_text(), re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_numbers_are_along_the_axis_and_names_are_lines(tmp_path: Path) -> None:
    path = made(
        tmp_path,
        *("--grid", "instances=4,1,2", "--grid", "policy=latency,round_robin"),
        *("--seeds", "2", "--hour-price", "2", "--slo-ttft-s", "1"),
    )
    data = data_of(path)
    assert data["x"] == {"name": "instances", "values": [1, 2, 4], "is_number": True}
    assert data["lines"] == ["policy latency", "policy round_robin"]
    assert [(p["values"], p["x"], p["line"]) for p in data["points"]] == [
        ([instances, policy], x, line)
        for instances, x in ((4, 2), (1, 0), (2, 1))
        for line, policy in enumerate(("latency", "round_robin"))
    ]
    keys = {column["key"] for column in data["columns"]}
    assert {"ttft_p99", "goodput", "token_hours", "token_cost"} <= keys
    cost = data["points"][0]["figures"]["token_cost"]
    hours = data["points"][0]["figures"]["token_hours"]
    assert cost["mean"] == pytest.approx(2 * hours["mean"])
    assert cost["least"] <= cost["mean"] <= cost["greatest"]
    assert "http" not in re.sub(r"http://www.w3.org/2000/svg", "", path.read_text())


def test_names_alone_are_along_the_axis_in_their_order(tmp_path: Path) -> None:
    data = data_of(made(tmp_path, "--grid", "policy=round_robin,latency"))
    assert data["x"]["values"] == ["round_robin", "latency"]
    assert not data["x"]["is_number"]
    assert data["lines"] == [""]
    assert "token_cost" not in {column["key"] for column in data["columns"]}


@pytest.mark.slow
@needs_a_browser
def test_in_a_browser_every_figure_has_a_chart_and_nothing_is_wider_than_the_window(
    tmp_path: Path,
) -> None:
    path = made(tmp_path, "--grid", "instances=1,2", "--grid", "policy=latency,round_robin")
    num_figures = len(data_of(path)["columns"])

    async def check(page: Any) -> None:
        await page.wait_for_selector("#points tbody tr")
        assert await page.locator("#charts svg").count() == num_figures
        assert await page.locator("#charts polyline").count() == 2 * num_figures
        assert await page.locator("#charts circle").count() == 4 * num_figures
        assert await page.locator("#points tbody tr").count() == 4

    look_at(path, check)
