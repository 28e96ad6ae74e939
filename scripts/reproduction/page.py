"""Fills the tables into `page.md`, which holds the words of `docs/reproduction.md`.

Invariant: every place is filled, and everything that is computed has its place.
"""

from __future__ import annotations

from pathlib import Path

from scripts.pages import filled
from scripts.reproduction import experiments
from scripts.reproduction.experiments import MIXES, published
from scripts.reproduction.report import Report

TEMPLATE = Path(__file__).with_name("page.md")


def page(report: Report, *, num_seeds: int) -> str:
    """The whole page."""
    parts = _parts(report)
    # After the tables, which count them.
    parts["num_points"] = f"{report.num_points}"
    parts["num_close"] = f"{report.num_points - report.num_far}"
    parts["seeds"] = "One seed." if num_seeds == 1 else f"{num_seeds} seeds, drawing the arrivals."
    return filled(TEMPLATE, parts)


def _parts(report: Report) -> dict[str, str]:
    scaled = published()["figure14"]
    judged = list(experiments.judged())
    return {
        "source": published()["source"].strip(),
        "slower": report.slower(),
        "booting": report.booting(),
        "figure10": report.figure10(),
        "figure11": "\n\n".join(f"### {mix}\n\n{report.figure11(mix)}" for mix in MIXES),
        "gains": report.gains(),
        "figure13": report.figure13(),
        "figure14_rate": report.figure14("14 rate", "requests/s", scaled["poisson"]),
        "figure14_cv": report.figure14("14 cv", "CV", scaled["gamma"]),
        "figure15": report.figure14("15", "threshold", published()["figure15"]),
        "cost": report.cost(),
        "better": report.better(judged),
        "better_seeds": f"{report.num_seeds(judged)}",
        "better_goal": report.better_goal(judged),
        "floors": report.floors(judged),
        "better_beyond": report.better(list(experiments.beyond())),
        "beyond_goal": report.beyond_goal(),
    }
