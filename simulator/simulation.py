"""Simulate a trace: the one function between options and result.

Invariant: the same trace and options give the same result, bit for bit; nothing reads a clock or
the machine. This module does not know how it is done (`cluster`), nor what the numbers mean
(`metrics`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from llumsched.simulator.options import SimulationOptions
from llumsched.simulator.results.result import SimulationResult
from llumsched.simulator.traces.trace import Trace


class ExtrapolationWarning(UserWarning):
    """A simulation went beyond what its models cover; `SimulationResult.warnings` says where."""


def simulate(
    trace: Trace,
    options: SimulationOptions,
    *,
    progress: Callable[[int, float], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> SimulationResult:
    """Run a trace through a simulated cluster under the policies of `options.config`.

    Args:
        progress: called now and then with the number of ended requests and the virtual time.
        stop: asked as often; True ends the simulation with what there is.

    Raises:
        SimulationError: the options do not fit the trace.
        PluginError: a policy cannot be found or built.
        ParamError: a parameter of a policy is wrong.
    """
    from llumsched.simulator.cluster.loop import Cluster

    result = Cluster(trace, options).run(progress, stop)
    for warning in result.warnings:
        warnings.warn(warning, ExtrapolationWarning, stacklevel=2)
    return result
