"""Instances of a machine that is about to go are told, once, and no others."""

from __future__ import annotations

from dataclasses import dataclass

from llumsched.pool.node_drain import DrainingMachines


@dataclass
class Placed:
    instance_id: str
    node_id: str | None
    serves: bool = True
    num_told: int = 0

    def leave(self) -> None:
        self.num_told += 1


def test_those_of_the_machine_are_told_once() -> None:
    here, beside, there = Placed("a", "m1"), Placed("b", "m1"), Placed("c", "m2")
    draining: list[str] = []
    machines = DrainingMachines(lambda: (here, beside, there), lambda: draining)
    machines.tick()
    assert not any(i.num_told for i in (here, beside, there))
    draining.append("m1")
    for _ in range(3):
        machines.tick()
    assert [i.num_told for i in (here, beside, there)] == [1, 1, 0]


def test_one_that_boots_is_told_when_it_serves() -> None:
    """No instance can be drained before; where it is is not known from the start either."""
    booting = Placed("a", None, serves=False)
    machines = DrainingMachines(lambda: (booting,), lambda: {"m1"})
    machines.tick()
    booting.node_id = "m1"
    machines.tick()
    told = [booting.num_told]
    booting.serves = True
    machines.tick()
    assert [*told, booting.num_told] == [0, 1]


def test_an_instance_that_has_ended_is_forgotten() -> None:
    instances = [Placed("a", "m1")]
    machines = DrainingMachines(lambda: instances, lambda: {"m1"})
    machines.tick()
    instances.clear()
    machines.tick()
    again = Placed("a", "m1")
    instances.append(again)
    machines.tick()
    assert again.num_told == 1
