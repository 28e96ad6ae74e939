"""The HTML report of a sweep: charts of its figures over one option, and every point.

The option of the horizontal axis is the one of numbers that has the most values; each combination
of the others is a line. How a page is put together is `report`'s to know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llumsched.policy_failures import tracebacks
from llumsched.simulator.results.comparison import FigureColumn, Spread
from llumsched.simulator.results.report import spread_data, write_page
from llumsched.simulator.sweep import Row


def write_sweep_report(
    path: Path,
    rows: Sequence[Row],
    columns: Sequence[FigureColumn],
    *,
    title: str,
    subtitle: str,
    settings: Mapping[str, str],
    remarks: Sequence[str] = (),
) -> None:
    """Write the page for the rows of a sweep, of which there is at least one.

    Args:
        columns: the figures that are drawn, in their order.
        settings: shown as they are, in their order.
        remarks: shown above everything else.
    """
    write_page(
        path,
        "sweep.html",
        "sweep.js",
        title=title,
        data={
            **sweep_data(rows, columns),
            "subtitle": subtitle,
            "settings": list(settings.items()),
            "notes": [],
            "remarks": list(remarks),
            "warnings": [
                f"{_said(row.point.values)}: seed {row.point.seed} was cut short"
                for row in rows
                if not row.is_complete
            ],
            "tracebacks": list(tracebacks(f for row in rows for f in row.policy_failures)),
        },
    )


def sweep_data(rows: Sequence[Row], columns: Sequence[FigureColumn]) -> dict[str, Any]:
    """Data that the page's script draws: the option along the axis, the lines, and the points."""
    by_point: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        by_point.setdefault(tuple(row.point.values.values()), []).append(row)
    axes = {
        name: list(dict.fromkeys(values[place] for values in by_point))
        for place, name in enumerate(rows[0].point.values)
    }
    along = max(axes, key=lambda name: (_are_numbers(axes[name]), len(axes[name])))
    x_values = sorted(axes[along]) if _are_numbers(axes[along]) else axes[along]
    lines: dict[str, int] = {}
    points = []
    for group in by_point.values():
        values = group[0].point.values
        line = _said({name: value for name, value in values.items() if name != along})
        points.append(
            {
                "values": list(values.values()),
                "x": x_values.index(values[along]),
                "line": lines.setdefault(line, len(lines)),
                "figures": {
                    column.key: spread_data(Spread.of(row.figures[column.key] for row in group))
                    for column in columns
                },
            }
        )
    return {
        "axes": [name.replace("_", " ") for name in axes],
        "x": {
            "name": along.replace("_", " "),
            "values": x_values,
            "is_number": _are_numbers(x_values),
        },
        "lines": list(lines),
        "columns": [{"key": c.key, "label": c.label, "unit": c.unit} for c in columns],
        "points": points,
        "num_seeds": max(len(group) for group in by_point.values()),
    }


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _said(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
