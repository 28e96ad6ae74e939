"""Small multiples as SVG: a panel a mix, a line a system, a band from least to greatest value.

Plain text, so that a change of a figure shows in a diff. The vertical axis is logarithmic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from llumsched.simulator.results.comparison import number

_WIDTH, _HEIGHT = 250, 190
_LEFT, _TOP, _RIGHT, _BOTTOM = 52, 34, 10, 34
_LEGEND = 30
_COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d5a97", "#c98b1f", "#555555", "#2a9d8f", "#7f5539")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A curve: (x, mean, least, greatest); `is_dashed` for what was published."""

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
    """The panels in rows, under one legend; values that are not positive are left out."""
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(_roots(names))}
    rows = math.ceil(len(panels) / columns)
    width, height = _WIDTH * min(columns, len(panels)), _HEIGHT * rows + _LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
        "<style>text { font: 10px sans-serif }</style>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *_legend(y_label, panels, colours),
    ]
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        parts.append(f'<g transform="translate({column * _WIDTH} {_LEGEND + row * _HEIGHT})">')
        parts += [*_panel(panel, colours), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _roots(names: Sequence[str]) -> list[str]:
    """A published curve has the colour of ours."""
    return list(dict.fromkeys(name.removesuffix(PUBLISHED) for name in names))


PUBLISHED = ", published"


def _legend(y_label: str, panels: Sequence[Panel], colours: Mapping[str, str]) -> Iterator[str]:
    yield _text(6, 14, y_label, "start")
    x = 6.0
    lines = {line.name: line for panel in panels for line in panel.lines}
    for name, line in lines.items():
        colour = colours[name.removesuffix(PUBLISHED)]
        yield _stroke([(x, 25), (x + 18, 25)], colour, line.is_dashed)
        yield _text(x + 22, 28, name, "start")
        x += 32 + 5.4 * len(name)


def _panel(panel: Panel, colours: Mapping[str, str]) -> Iterator[str]:
    points = [p for line in panel.lines for p in line.points if p[1] > 0]
    if not points:
        return
    xs = sorted({p[0] for p in points})
    lows = [p[2] if p[2] > 0 else p[1] for p in points]
    low, high = min(lows) * 0.8, max(p[3] for p in points) * 1.25
    span = (xs[-1] - xs[0]) or 1.0
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        share = (math.log(max(y, low)) - math.log(low)) / (math.log(high) - math.log(low))
        return _LEFT + 8 + (right - _LEFT - 16) * (x - xs[0]) / span, bottom - share * (
            bottom - _TOP
        )

    yield _text(_LEFT, _TOP - 8, panel.title, "start")
    yield _text((_LEFT + right) / 2, _HEIGHT - 8, panel.x_label, "middle")
    for value in _ticks(low, high):
        y = at(xs[0], value)[1]
        yield _stroke([(_LEFT, y), (right, y)], "#dddddd", False, width=1)
        yield _text(_LEFT - 5, y + 3, number(value), "end")
    for value in xs[:: max(1, len(xs) // 6)]:
        yield _text(at(value, low)[0], bottom + 13, f"{value:g}", "middle")
    for line in panel.lines:
        known = [p for p in line.points if p[1] > 0]
        colour = colours[line.name.removesuffix(PUBLISHED)]
        band = [at(x, most) for x, _, _, most in known]
        band += [at(x, least) for x, _, least, _ in reversed(known)]
        if not line.is_dashed and len(known) > 1:
            yield f'<polygon points="{_path(band)}" fill="{colour}" opacity="0.15"/>'
        yield _stroke([at(x, mean) for x, mean, _, _ in known], colour, line.is_dashed)


def _ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if high / low > 100 else (1, 2, 5)
    return [v for d in decades for m in steps if low <= (v := m * 10.0**d) <= high]


def _stroke(
    points: Sequence[tuple[float, float]], colour: str, is_dashed: bool, *, width: float = 1.6
) -> str:
    dashes = ' stroke-dasharray="4 3"' if is_dashed else ""
    return (
        f'<polyline points="{_path(points)}" fill="none" stroke="{colour}"'
        f' stroke-width="{width:g}"{dashes}/>'
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
