"""A plot of a fit's residuals: measured time against how far off the fit is."""

from __future__ import annotations

import numpy as np

from llumsched.simulator.results.svg import svg_of
from llumsched.simulator.traces.trace import Floats

_LARGEST_SHARE = 0.5


def residual_plot(measured_s: Floats, predicted_s: Floats, *, title: str) -> str:
    """An SVG with a dot a step: its duration on a logarithmic axis, and predicted / measured - 1.

    Residuals beyond 50 % are drawn at the edge. It needs matplotlib, which serving installs.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    residuals = np.clip(predicted_s / measured_s - 1, -_LARGEST_SHARE, _LARGEST_SHARE)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel("measured step, ms")
    axis.set_xscale("log")
    axis.set_ylim(-1.05 * _LARGEST_SHARE, 1.05 * _LARGEST_SHARE)
    axis.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axis.axhline(0, color="#888888", lw=0.8)
    axis.grid(color="#e4e4e4", lw=0.6)
    axis.scatter(1e3 * measured_s, residuals, s=10, color="#2a78d6", alpha=0.5, gid="residuals")
    return svg_of(figure)
