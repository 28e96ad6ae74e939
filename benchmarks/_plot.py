"""Line plots as SVG, in as few lines as a benchmark needs: two logarithmic axes and a legend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from benchmarks._report import number

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 170, 40, 50
# More values than this are not marked one by one.
MAX_MARKED = 12
COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d5a97", "#c98b1f", "#555555")

Points = Sequence[tuple[float, float]]


def lines(title: str, x: str, y: str, series: Mapping[str, Points]) -> str:
    """An SVG of ``series``, each a list of positive points, on logarithmic axes."""
    xs = [point[0] for points in series.values() for point in points]
    ys = [point[1] for points in series.values() for point in points]
    x_scale = _Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_scale = _Scale(min(ys), max(ys), HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
        "<style>text { font: 12px sans-serif }</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, TOP - 18, title, "start"),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x, "middle"),
        _text(LEFT - 8, TOP - 4, y, "end"),
    ]
    is_sparse = len(set(xs)) <= MAX_MARKED
    for value in sorted(set(xs)) if is_sparse else x_scale.ticks():
        at = x_scale.at(value)
        parts += [
            _line(at, TOP, at, HEIGHT - BOTTOM),
            _text(at, HEIGHT - BOTTOM + 18, number(value), "middle"),
        ]
    for value in y_scale.ticks():
        at = y_scale.at(value)
        parts += [_line(LEFT, at, WIDTH - RIGHT, at), _text(LEFT - 8, at + 4, number(value), "end")]
    for index, (name, points) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{x_scale.at(a):.1f},{y_scale.at(b):.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{x_scale.at(a):.1f}" cy="{y_scale.at(b):.1f}" r="3" fill="{colour}"/>'
            for a, b in (points if is_sparse else ())
        ]
        legend = TOP + 14 + 20 * index
        parts.append(
            f'<rect x="{WIDTH - RIGHT + 16}" y="{legend - 9}" width="10" height="10" '
            f'fill="{colour}"/>'
        )
        parts.append(_text(WIDTH - RIGHT + 32, legend, name, "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Scale:
    """From values to pixels, logarithmically."""

    def __init__(self, low: float, high: float, first: float, last: float) -> None:
        self._low, self._high = math.log(low) - 0.1, math.log(high) + 0.1
        self._first, self._last = first, last
        self._bounds = (low, high)

    def at(self, value: float) -> float:
        share = (math.log(value) - self._low) / (self._high - self._low)
        return self._first + share * (self._last - self._first)

    def ticks(self) -> list[float]:
        low, high = self._bounds
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [m * 10.0**d for d in decades for m in (1, 2, 5)]
        return [tick for tick in found if low * 0.95 <= tick <= high * 1.05]


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
