"""A plot of a fit's residuals as SVG: measured time against how far off the fit is."""

from __future__ import annotations

import math
from html import escape

import numpy as np

from llumsched.simulator.traces.trace import Floats

_WIDTH, _HEIGHT = 720, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 40, 44
_LARGEST_SHARE = 0.5
_TICKS = (-0.4, -0.2, 0.0, 0.2, 0.4)


def residual_plot(measured_s: Floats, predicted_s: Floats, *, title: str) -> str:
    """A dot a step: its duration on a logarithmic axis, and predicted / measured - 1.

    Residuals beyond 50 % are drawn at the edge.
    """
    residuals = np.clip(predicted_s / measured_s - 1, -_LARGEST_SHARE, _LARGEST_SHARE)
    low, high = float(measured_s.min()), float(measured_s.max())
    span = math.log(high / low) or 1.0

    def x(seconds: float) -> float:
        return _LEFT + math.log(seconds / low) / span * (_WIDTH - _LEFT - _RIGHT)

    def y(share: float) -> float:
        half = (_HEIGHT - _TOP - _BOTTOM) / 2
        return _TOP + half - share / _LARGEST_SHARE * half

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"',
        ' font-family="system-ui, sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{_LEFT}" y="20" font-size="14" fill="#222">{escape(title)}</text>',
    ]
    for share in _TICKS:
        colour = "#888" if share == 0 else "#e4e4e4"
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(share):.1f}" y2="{y(share):.1f}"'
            f' stroke="{colour}"/>'
            f'<text x="{_LEFT - 8}" y="{y(share) + 4:.1f}" text-anchor="end" fill="#555">'
            f"{100 * share:+.0f} %</text>"
        )
    for seconds in np.geomspace(low, high, 6).tolist():
        parts.append(
            f'<text x="{x(seconds):.1f}" y="{_HEIGHT - 24}" text-anchor="middle" fill="#555">'
            f"{1e3 * seconds:.3g}</text>"
        )
    parts.append(
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle" fill="#555">'
        "measured step, ms</text>"
    )
    parts += [
        f'<circle cx="{x(seconds):.1f}" cy="{y(share):.1f}" r="2.2" fill="#2a78d6"'
        ' fill-opacity="0.5"/>'
        for seconds, share in zip(measured_s.tolist(), residuals.tolist(), strict=True)
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"
