"""Instances of one machine, which take cores or memory bandwidth from one another.

A step takes longer by what the others do when it begins: decode, or compute prompts. An instance
computes from the start of its first step until it has nothing to do.

Invariant: whoever begins or stops to compute is known to the others only after that instant, so the
order of the steps of one instant does not matter. This module does not know what is in a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from llumsched.simulator.engines.cost import StepCost
from llumsched.simulator.hardware.spec import MachineSharing, StepCoefficients
from llumsched.simulator.kernel import Kernel

if TYPE_CHECKING:
    from llumsched.simulator.engines.base import Engine

IDLE, DECODES, PROMPTS = range(3)
"""An instance's work as the others feel it."""


class Costs(NamedTuple):
    """Of a step that only decodes, and of one that computes prompts as well."""

    decodes: StepCost
    prompts: StepCost


class MachineCosts:
    """Cost of steps, by what the other instances of the machine do.

    Each pair is of steps as they are, and of those while KV is being copied.
    """

    def __init__(self, step: StepCoefficients, machine: MachineSharing, max_tokens: int) -> None:
        self._step = step
        self._machine = machine
        self._max_tokens = max_tokens
        self._pairs: dict[tuple[int, int], tuple[Costs, Costs]] = {}

    def beside(self, num_decoding: int, num_prompting: int) -> tuple[Costs, Costs]:
        """While so many others only decode, and so many compute prompts."""
        key = (num_decoding, num_prompting)
        if key not in self._pairs:
            self._pairs[key] = (self._costs(0.0, *key), self._costs(self._step.copy_slowdown, *key))
        return self._pairs[key]

    def _costs(self, copy_slowdown: float, num_decoding: int, num_prompting: int) -> Costs:
        of_decodes, of_prompts = self._machine.slowdowns(num_decoding, num_prompting)
        decodes = StepCost(self._step, self._max_tokens, copy_slowdown + of_decodes)
        if of_prompts == of_decodes:
            return Costs(decodes, decodes)
        return Costs(decodes, StepCost(self._step, self._max_tokens, copy_slowdown + of_prompts))


class Machine:
    """Tells its instances what the others do."""

    def __init__(self, kernel: Kernel, costs: MachineCosts) -> None:
        self._kernel = kernel
        self._costs = costs
        self._engines: list[Engine] = []

    def add(self, engine: Engine, now: int) -> None:
        """One more instance runs here."""
        self._engines.append(engine)
        engine.machine = self
        self._tell(engine, now)

    def changed(self, now: int) -> None:
        """One of the instances does something else than before."""
        self._kernel.send(now + 1, self._tell_all)

    def _tell_all(self, now: int) -> None:
        for engine in self._engines:
            self._tell(engine, now)

    def _tell(self, engine: Engine, now: int) -> None:
        doing = [other.doing for other in self._engines if other is not engine]
        costs = self._costs.beside(doing.count(DECODES), doing.count(PROMPTS))
        engine.set_costs(*costs, now)
