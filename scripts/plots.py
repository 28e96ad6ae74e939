"""Figures of the docs, as SVG by matplotlib.

The same data give the same bytes, so that a change of a figure is a change of its data. Text stays
text: a reader may search it, and a font is the reader's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure

from llumsched.simulator.results.comparison import number
from llumsched.simulator.results.svg import svg_of

COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d5a97", "#c98b1f", "#555555", "#2a9d8f", "#7f5539")
# More values than this are not marked one by one.
MAX_MARKED = 12
PUBLISHED = ", published"

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A curve: (x, mean, least, greatest); ``is_dashed`` for what was published."""

    name: str
    points: Sequence[tuple[float, float, float, float]]
    is_dashed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One small figure."""

    title: str
    x_label: str
    lines: Sequence[Line]


def chart(y_label: str, panels: Sequence[Panel], *, columns: int = 3) -> str:
    """An SVG of small multiples: a panel a mix, a line a system, a band from least to greatest.

    The vertical axis is logarithmic; values that are not positive are left out.
    """
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    # A published curve has the colour of ours.
    roots = dict.fromkeys(name.removesuffix(PUBLISHED) for name in names)
    colours = dict(zip(roots, cycle(COLOURS), strict=False))
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.6 * rows + 0.7), layout="constrained")
    figure.suptitle(y_label, x=0.01, ha="left", fontsize=9)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes, panels, strict=False):
        axis.set_title(panel.title, loc="left", fontsize=9)
        axis.set_xlabel(panel.x_label)
        axis.set_yscale("log")
        for line in panel.lines:
            points = [point for point in line.points if point[1] > 0]
            if not points:
                continue
            x, mean, least, greatest = zip(*points, strict=True)
            colour = colours[line.name.removesuffix(PUBLISHED)]
            (handle,) = axis.plot(x, mean, "--" if line.is_dashed else "-", color=colour, lw=1.4)
            handles.setdefault(line.name, handle)
            if not line.is_dashed and len(points) > 1:
                low = [a if a > 0 else b for a, b in zip(least, mean, strict=True)]
                axis.fill_between(x, low, greatest, color=colour, alpha=0.15, lw=0)
        _plain(axis)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower left", ncols=4, frameon=False
    )
    return svg_of(figure)


def lines(title: str, x: str, y: str, series: Mapping[str, Points]) -> str:
    """An SVG of ``series``, each a list of positive points, on logarithmic axes."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_xscale("log")
    axis.set_yscale("log")
    values = sorted({point[0] for points in series.values() for point in points})
    is_sparse = len(values) <= MAX_MARKED
    for (name, points), colour in zip(series.items(), cycle(COLOURS), strict=False):
        marker = "o" if is_sparse else ""
        axis.plot(*zip(*points, strict=True), marker=marker, ms=4, color=colour, label=name)
    if is_sparse:
        axis.set_xticks(values, [number(value) for value in values])
        axis.minorticks_off()
    _plain(axis)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return svg_of(figure)


def _plain(axis: Any) -> None:
    axis.grid(color="#dddddd", lw=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(_between_decades)


def _between_decades(value: float, _: int) -> str:
    """A label at 2 and 5 of each decade alone, which leaves room between labels."""
    first_digit = f"{value:e}"[0]
    return f"{value:g}" if first_digit in "25" else ""
