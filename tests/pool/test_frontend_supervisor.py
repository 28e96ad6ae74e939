"""Frontends that boot, die and are started again, played without a process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from llumsched.pool.backoff import FIRST_BACK_OFF_S, GROWN_UP_S, MAX_BACK_OFF_S, BackOff
from llumsched.pool.frontend_supervisor import FrontendSupervisor


@dataclass
class Process:
    """A frontend whose life the test decides."""

    pid: int
    has_booted: bool = True
    end: str | None = None
    was_killed: bool = False

    def serves(self) -> bool:
        return self.has_booted

    def end_reason(self) -> str | None:
        return self.end

    def kill(self) -> None:
        self.was_killed = True


@dataclass
class FakeHost:
    """Notes what is done; what a dead one had is forgotten when the test says so."""

    boots: bool = True
    forgets: bool = True
    started: list[tuple[int, Process]] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)

    def start(self, index: int) -> Process:
        process = Process(pid=100 + len(self.started), has_booted=self.boots)
        self.started.append((index, process))
        return process

    def forget(self, index: int) -> Callable[[], bool]:
        self.forgotten.append(index)
        return lambda: self.forgets

    def latest(self, index: int) -> Process:
        return [process for place, process in self.started if place == index][-1]


class Stage:
    """Two frontends, and a clock."""

    def __init__(self, host: FakeHost) -> None:
        self.now_s = 0.0
        self.host = host
        self.frontends = FrontendSupervisor(host, 2, boot_timeout_s=30.0, clock=lambda: self.now_s)

    def tick(self, after_s: float = 0.0) -> None:
        self.now_s += after_s
        self.frontends.tick()

    def states(self) -> list[str]:
        return [status.state for status in self.frontends.describe()]


def test_one_that_dies_is_followed_by_another_in_its_place() -> None:
    stage = Stage(FakeHost())
    assert stage.states() == ["booting", "booting"]
    stage.tick()
    assert stage.states() == ["serving", "serving"]

    stage.host.latest(1).end = "it was killed"
    stage.tick()
    assert stage.states() == ["serving", "backing off"]
    assert stage.host.forgotten == [1]
    status = stage.frontends.describe()[1]
    assert (status.pid, status.num_deaths, status.last_failure) == (None, 1, "it was killed")

    stage.tick(FIRST_BACK_OFF_S)
    stage.tick()
    assert stage.states() == ["serving", "serving"]
    assert [index for index, _ in stage.host.started] == [0, 1, 1]
    assert stage.frontends.describe()[1].pid == 102


def test_none_is_started_while_a_request_of_the_dead_one_may_still_run() -> None:
    stage = Stage(FakeHost(forgets=False))
    stage.tick()
    stage.host.latest(0).end = "it was killed"
    stage.tick()
    stage.tick(10 * MAX_BACK_OFF_S)
    assert stage.states()[0] == "backing off"
    stage.host.forgets = True
    stage.tick()
    stage.tick()
    assert stage.states()[0] == "serving"


def test_one_that_never_serves_is_killed_and_tried_again() -> None:
    stage = Stage(FakeHost(boots=False))
    first = stage.host.latest(0)
    stage.tick(31.0)
    assert first.was_killed
    assert "within 30 s" in stage.frontends.describe()[0].last_failure
    stage.tick(FIRST_BACK_OFF_S)
    assert stage.host.latest(0) is not first


def test_the_pause_doubles_while_they_die_young() -> None:
    back_off = BackOff()
    pauses = [back_off.died("x", lived_s=0.0) for _ in range(8)]
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, MAX_BACK_OFF_S, MAX_BACK_OFF_S]
    assert back_off.died("x", lived_s=GROWN_UP_S) == 0.0
    assert back_off.died("y", lived_s=1.0) == pytest.approx(FIRST_BACK_OFF_S)
    assert (back_off.num_deaths, back_off.last_failure) == (10, "y")
