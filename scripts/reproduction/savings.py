"""How much fewer instances one system needs than another, computed in two ways.

A curve is a list of (mean instances, P99 prefill in seconds), by rising threshold.

* As in the paper's abstract: the base at its last threshold but one, the other at its first, and
  the difference divided by the *smaller* number. The two points have different latencies.
* At equal P99: the P99 of that same point of the base; where the other's curve reaches it, by
  straight lines between its points; and the difference divided by the base's number.
"""

from __future__ import annotations

from collections.abc import Sequence

from llumsched.simulator.results.comparison import number

Curve = Sequence[tuple[float, float]]


def savings(base: Curve, other: Curve, thresholds: Sequence[float]) -> tuple[str, str, str]:
    """The two savings in percent and the P99 of the second, as text."""
    assert len(base) == len(other) == len(thresholds)
    num_base, p99 = base[-2]
    unequal = 100 * (num_base / other[0][0] - 1)
    found = instances_at(other, p99)
    if found is None:
        return f"{number(unequal)} %", "none: no threshold reaches it", f"{number(p99)} s"
    num_other, is_bound = found
    equal = 100 * (1 - num_other / num_base)
    at_least = "at least " if is_bound else ""
    return f"{number(unequal)} %", f"{at_least}{number(equal)} %", f"{number(p99)} s"


def instances_at(curve: Curve, p99: float) -> tuple[float, bool] | None:
    """Fewest instances with which a curve keeps a P99, and whether fewer might do as well; ``None``
    if no point of the curve keeps it."""
    points = sorted(curve)
    for index, (num_instances, value) in enumerate(points):
        if value <= p99:
            if not index:
                return num_instances, True
            fewer, worse = points[index - 1]
            share = (p99 - worse) / (value - worse)
            return fewer + share * (num_instances - fewer), False
    return None
