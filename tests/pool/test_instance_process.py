"""Knowledge of a process on another machine, and what follows where it is missing."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray

from llumsched.pool.instance_process import (
    FRESH_S,
    LOOK_INTERVAL_S,
    UNKNOWN,
    LocalProcess,
    NodeWatch,
    NodeWatches,
    ProcessSample,
    RemoteProcess,
)
from llumsched.pool.liveness import LivenessLimits, LivenessProbe
from llumsched.pool.process_activity import Work

TICK_S = 0.05
HEARTBEAT_S = 10.0
STEP_S = 60.0
IDLE = Work(cpu_s=3.0, is_ready=False)
BUSY = Work(cpu_s=3.0, is_ready=True)
DIES = ray.exceptions.RayActorError()


@dataclass
class Network:
    """Between a supervisor and the watch of another machine; its answers are those of the test."""

    now_s: float = 100.0
    answer: ProcessSample | Exception | None = None
    reaches: bool = True
    questions: list[tuple[int, bool]] = field(default_factory=list)

    def look(self, pid: int, of_descendants: bool) -> Any:
        self.questions.append((pid, of_descendants))
        return SimpleNamespace(answer=self.answer)

    def wait(self, asked: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        assert timeout == 0, "it must not wait"
        return (asked, []) if self.reaches else ([], asked)

    def get(self, question: Any) -> ProcessSample | None:
        if isinstance(question.answer, Exception):
            raise question.answer
        found: ProcessSample | None = question.answer
        return found

    def process(self) -> RemoteProcess:
        watch = SimpleNamespace(look=SimpleNamespace(remote=self.look))
        return RemoteProcess(watch, 7, clock=lambda: self.now_s)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network()
    monkeypatch.setattr(ray, "wait", network.wait)
    monkeypatch.setattr(ray, "get", network.get)
    return network


def is_unknown(process: RemoteProcess) -> bool:
    return (
        process.work() == process.descendants_work() == UNKNOWN
        and process.has_descendants()
        and not process.is_stopped()
    )


def test_nothing_is_known_before_the_first_answer(network: Network) -> None:
    network.reaches = False
    assert is_unknown(network.process())


def test_an_answer_is_known_until_it_is_old(network: Network) -> None:
    network.answer = ProcessSample(is_stopped=True, work=IDLE)
    process = network.process()
    process.is_stopped()
    assert process.is_stopped()
    assert process.work() == IDLE
    network.reaches = False
    network.now_s += 1.01 * FRESH_S
    assert is_unknown(process)


@pytest.mark.parametrize("answer", [None, DIES])
def test_a_watch_that_knows_nothing(network: Network, answer: Exception | None) -> None:
    """The watch's process is gone, or the watch itself."""
    network.answer = answer
    process = network.process()
    process.is_stopped()
    assert is_unknown(process)


def test_descendants_are_looked_for_only_once_they_are_asked_for(network: Network) -> None:
    network.answer = ProcessSample(is_stopped=False, work=IDLE)
    process = network.process()
    process.work()
    assert process.has_descendants(), "nobody has looked"
    assert process.descendants_work() == UNKNOWN
    network.answer = ProcessSample(
        is_stopped=False, work=IDLE, has_descendants=False, descendants=BUSY
    )
    for _ in range(2):
        network.now_s += LOOK_INTERVAL_S
        process.work()
    assert process.descendants_work() == BUSY
    assert not process.has_descendants()
    assert network.questions == [(7, False), (7, True), (7, True)]


def test_it_is_not_asked_more_often_than_is_of_use(network: Network) -> None:
    network.answer = ProcessSample(is_stopped=False, work=IDLE)
    process = network.process()
    for _ in range(round(10 / TICK_S)):
        network.now_s += TICK_S
        process.is_stopped()
        process.work()
    assert len(network.questions) <= 10 / LOOK_INTERVAL_S + 1


def dies_after(network: Network) -> tuple[float, str] | None:
    """When a process that gave one sign of life counts as dead, and why."""
    signs = LivenessProbe(LivenessLimits(heartbeat_s=HEARTBEAT_S, step_s=STEP_S))
    process = network.process()
    for tick in range(round(2 * STEP_S / TICK_S)):
        network.now_s += TICK_S
        reason = signs.tick(TICK_S, None if tick else 0.0, process)
        if reason is not None:
            return tick * TICK_S, reason
    return None


IDLE_LOOK = ProcessSample(is_stopped=False, work=IDLE, has_descendants=False, descendants=IDLE)


@pytest.mark.parametrize("answer", [None, DIES, IDLE_LOOK], ids=["silent", "dead", "idle"])
def test_one_that_is_not_seen_to_work_is_given_its_time(
    network: Network, answer: ProcessSample | Exception | None
) -> None:
    network.answer = answer
    found = dies_after(network)
    assert found is not None
    assert found[0] == pytest.approx(HEARTBEAT_S, abs=1.0)
    assert "no sign of life" in found[1]


def test_one_that_is_seen_to_work_is_given_the_time_of_a_step(network: Network) -> None:
    network.answer = ProcessSample(is_stopped=False, work=BUSY)
    found = dies_after(network)
    assert found is not None
    assert found[0] == pytest.approx(STEP_S, abs=2 * TICK_S)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


def test_a_watch_looks_at_processes_of_its_machine(sleeper: subprocess.Popen[bytes]) -> None:
    watch = NodeWatch()
    assert watch.look(sleeper.pid, of_descendants=False) is not None
    look = watch.look(os.getpid(), of_descendants=True)
    assert look is not None
    assert look.has_descendants
    assert look.descendants is not None
    watch.kill(sleeper.pid)
    assert sleeper.wait(10) != 0
    watch.kill(sleeper.pid)
    assert watch.look(sleeper.pid, of_descendants=False) is not None, "a dead one has no news"
    assert NodeWatch().look(sleeper.pid, of_descendants=False) is None
    with pytest.raises(psutil.NoSuchProcess):
        LocalProcess(sleeper.pid)


class Handle:
    """Of an actor."""


def test_a_watch_ends_with_the_last_instance_of_its_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one that stays, a machine is busy for ever to an autoscaler."""
    started: list[str] = []

    def start(_watches: NodeWatches, node_id: str) -> Any:
        started.append(node_id)
        return Handle()

    monkeypatch.setattr(NodeWatches, "_start", start)
    watches = NodeWatches()
    one, other = RemoteProcess(watches.of("m"), 1), RemoteProcess(watches.of("m"), 2)
    assert started == ["m"], "they share it"
    del one
    gc.collect()
    other = RemoteProcess(watches.of("m"), 3)
    assert started == ["m"]
    del other
    gc.collect()
    watches.of("m")
    assert started == ["m", "m"], "nobody held the first"
