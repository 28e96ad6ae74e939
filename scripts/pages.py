"""Pages of the docs that are written by a program: their tables, numbers, and places to fill."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

_PLACE = re.compile(r"\{\{(\w+)\}\}")

Cell = str | float


def table(columns: Sequence[Cell], rows: Iterable[Sequence[Cell]]) -> str:
    """A markdown table; a cell that is no text is shown by ``number``."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(_shown, line))} |" for line in lines)


def _shown(cell: Cell) -> str:
    return cell.replace("|", "\\|") if isinstance(cell, str) else number(cell)


def number(value: float) -> str:
    """Three significant digits, thousands separated: ``0.0123``, ``4.57``, ``12,300``."""
    if not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:,.6g}"


def filled(template: Path, parts: Mapping[str, str]) -> str:
    """The page of a template, whose places are ``{{name}}``.

    Raises:
        ValueError: a place that nothing fills, or a part without a place.
    """
    text = template.read_text(encoding="utf-8")
    if odd := set(_PLACE.findall(text)) ^ parts.keys():
        raise ValueError(f"{template}: a place or a part without the other: {', '.join(odd)}")
    return _PLACE.sub(lambda place: parts[place[1]], text)
