"""Instances of one machine, which take cores or memory bandwidth from one another.

A step takes longer the more of the others compute when it begins. An instance computes from the
start of its first step until it has nothing to do.

Invariant: whoever begins or stops to compute is known to the others only after that instant, so the
order of the steps of one instant does not matter. This module does not know what is in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llumsched.simulator.cost import StepCost
from llumsched.simulator.hardware import MachineSharing, StepCoefficients
from llumsched.simulator.kernel import Kernel

if TYPE_CHECKING:
    from llumsched.simulator.engine_base import Engine

Costs = tuple[StepCost, StepCost]
"""Of a step, and of one while KV is being copied."""


def machine_costs(step: StepCoefficients, machine: MachineSharing, max_tokens: int) -> list[Costs]:
    """What steps cost, by the number of other instances of the machine that compute."""
    shares = [0.0]
    if machine.slowdown:
        most = machine.num_instances - 1
        shares += [machine.slowdown * num_others / most for num_others in range(1, most + 1)]
    return [
        (StepCost(step, max_tokens, share), StepCost(step, max_tokens, share + step.copy_slowdown))
        for share in shares
    ]


class Machine:
    """Tells its instances how many of the others compute."""

    def __init__(self, kernel: Kernel, costs: Sequence[Costs]) -> None:
        self._kernel = kernel
        self._costs = costs
        self._engines: list[Engine] = []

    def add(self, engine: Engine, now: int) -> None:
        """One more instance runs here."""
        self._engines.append(engine)
        engine.machine = self
        self._tell(engine, now)

    def changed(self, now: int) -> None:
        """One of the instances has begun or stopped to compute."""
        self._kernel.send(now + 1, self._tell_all)

    def _tell_all(self, now: int) -> None:
        for engine in self._engines:
            self._tell(engine, now)

    def _tell(self, engine: Engine, now: int) -> None:
        num_others = sum(other.computes for other in self._engines if other is not engine)
        engine.set_costs(*self._costs[num_others], now)
