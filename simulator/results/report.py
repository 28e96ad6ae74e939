"""The HTML report: one file, to open without a network and to hand on.

Markup, style and scripts are in `report_page/`. They are put into one file with the figures as
JSON, and the script draws them. Nothing is fetched from anywhere.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from llumsched.policy_failures import tracebacks
from llumsched.simulator.results.comparison import (
    Run,
    Spread,
    best_labels,
    by_label,
    shown_columns,
    spreads,
)
from llumsched.simulator.results.export import quantile_curve
from llumsched.simulator.results.remarks import warnings_of

_CURVES = (("ttft_s", "TTFT", "s", 1.0), ("tpot_s", "TPOT", "ms", 1e3), ("e2e_s", "E2E", "s", 1.0))


def write_report(
    path: Path,
    runs: Sequence[Run],
    *,
    title: str,
    subtitle: str,
    settings: Mapping[str, str],
    notes: Sequence[str] = (),
    remarks: Sequence[str] = (),
) -> None:
    """Write the page for these runs; `settings` are shown as they are, in their order, and the
    remarks above everything else."""
    write_page(
        path,
        "page.html",
        "script.js",
        title=title,
        data=report_data(runs, subtitle=subtitle, settings=settings, notes=notes, remarks=remarks),
    )


def write_page(
    path: Path, markup: str, script: str, *, title: str, data: Mapping[str, Any]
) -> None:
    """Put the parts of a page into one file: the markup of its figures and its script by their
    names in `report_page/`, and the data that the script draws, without NaN."""
    page = _part("frame.html")
    content = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for name, text in (
        ("TITLE", html.escape(title)),
        ("STYLE", _part("style.css")),
        ("FIGURES", _part(markup)),
        ("SCRIPT", f"{_part('common.js')}\n\n{_part(script)}"),
        # A closing tag inside a string would end the element that holds the JSON.
        ("DATA", content.replace("<", "\\u003c")),
    ):
        page = page.replace(f"%{name}%", text)
    path.write_text(page, encoding="utf-8")


def report_data(
    runs: Sequence[Run],
    *,
    subtitle: str,
    settings: Mapping[str, str],
    notes: Sequence[str],
    remarks: Sequence[str] = (),
) -> dict[str, Any]:
    """Data that the page's script draws."""
    table = spreads(runs)
    grouped = by_label(runs)
    timelines = {
        label: {**run.timeline, "seed": run.seed}
        for label, group in grouped.items()
        for run in group[:1]
        if run.timeline is not None
    }
    return {
        "subtitle": subtitle,
        "policies": list(table),
        "num_seeds": max(len(group) for group in grouped.values()),
        "columns": [
            {
                "key": column.key,
                "label": column.label,
                "unit": column.unit,
                "best": sorted(best_labels(column, table)),
            }
            for column in shown_columns(table)
        ],
        "table": {
            label: {key: spread_data(spread) for key, spread in row.items()}
            for label, row in table.items()
        },
        "cdfs": [_cdf(grouped, *curve) for curve in _CURVES],
        "timelines": timelines,
        "settings": list(settings.items()),
        "notes": list(notes),
        "remarks": list(remarks),
        "tracebacks": list(tracebacks(failure for run in runs for failure in run.policy_failures)),
        "warnings": warnings_of(runs),
    }


def _cdf(
    grouped: Mapping[str, Sequence[Run]], attribute: str, label: str, unit: str, scale: float
) -> dict[str, Any]:
    curves = {}
    for policy, group in grouped.items():
        pooled = np.concatenate([getattr(run.samples, attribute) for run in group])
        values, shares = quantile_curve(pooled * scale)
        curves[policy] = {"values": [float(f"{v:.5g}") for v in values], "shares": shares}
    return {"label": label, "unit": unit, "curves": curves}


def spread_data(spread: Spread) -> dict[str, float | None]:
    """A spread as the pages have it: null where there is no value."""

    def plain(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "mean": plain(spread.mean),
        "least": plain(spread.least),
        "greatest": plain(spread.greatest),
    }


def _part(name: str) -> str:
    folder = files("llumsched.simulator") / "report_page"
    return (folder / name).read_text(encoding="utf-8").rstrip("\n")
