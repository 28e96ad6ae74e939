"""Instances that boot, die, hang, and are started again, played without a process."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from llumsched.instance.heartbeat import start_beating
from llumsched.pool.backoff import MAX_BACK_OFF_S
from llumsched.pool.heartbeat_listener import HeartbeatListener
from llumsched.pool.instance_supervisor import QUIET_TICK_S, TICK_S, InstanceSupervisor
from llumsched.pool.liveness import LivenessLimits
from llumsched.pool.process_activity import Work
from llumsched.wire.keys import PoolKeys
from llumsched.wire.ping import PingTimer

LIMITS = LivenessLimits(heartbeat_s=3.0, step_s=60.0)


@dataclass
class Process:
    """An instance whose life the test decides."""

    boot: str | None = None
    end: str | None = None
    answers: bool = True
    stopped: bool = False
    has_served: bool = False
    tells: Callable[[], None] | None = None
    was_killed: bool = False
    pid: int | None = 1
    node: str | None = "10.0.0.1"

    def boot_failure(self) -> str | None:
        return "it was killed" if self.was_killed else self.boot

    def serve(self) -> None:
        self.has_served = True

    def end_reason(self) -> str | None:
        return "it was killed" if self.was_killed else self.end

    def tell_of_end(self, ended: Callable[[], None]) -> None:
        self.tells = ended

    def is_stopped(self) -> bool:
        return self.stopped

    def work(self) -> Work:
        return Work(cpu_s=0.0, is_ready=False)

    def has_descendants(self) -> bool:
        return False

    def descendants_work(self) -> Work:
        return self.work()

    def kill(self) -> None:
        self.was_killed = True


@dataclass
class FakePool:
    """Notes what the supervisor does, in order."""

    scheduler_hears: bool = True
    boots_at_once: bool = True
    started: dict[int, Process] = field(default_factory=dict)
    launch_ids: list[str | None] = field(default_factory=list)
    notes: list[tuple[object, ...]] = field(default_factory=list)

    def start(self, engine_index: int, launch_id: str | None) -> Process:
        self.launch_ids.append(launch_id)
        self.started[engine_index] = Process(boot="" if self.boots_at_once else None)
        return self.started[engine_index]

    def heard(self) -> dict[int, float]:
        return {index: 0.0 for index, process in self.started.items() if process.answers}

    def tell_scheduler(self, instance_id: str, reason: str) -> bool:
        self.notes.append(("told", instance_id))
        return self.scheduler_hears

    def gone(self, engine_index: int, *, expected: bool) -> None:
        process = self.started.get(engine_index)
        assert process is None or process.was_killed, "told of a death that is not certain"
        self.notes.append(("gone", engine_index, expected))

    def refused(self, launch_id: str, reason: str) -> None:
        self.notes.append(("refused", launch_id))


class Stage:
    """A supervisor with two instances, and a clock that only the test moves."""

    def __init__(self, **limits: float) -> None:
        self.now_s = 1000.0
        self.pool = FakePool()
        self.supervisor = InstanceSupervisor(
            self.pool,
            max_instances=4,
            boot_timeout_s=limits.get("boot_timeout_s", 100.0),
            limits=LIMITS,
            clock=lambda: self.now_s,
        )
        for index in range(2):
            process = Process(boot="", has_served=True)
            self.pool.started[index] = process
            self.supervisor.adopt(index, process)

    def pass_time(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            self.now_s += TICK_S
            self.supervisor.tick()

    def states(self) -> dict[str, str]:
        return {berth.instance_id: berth.state for berth in self.supervisor.describe()}


def test_another_takes_the_place_of_one_that_died() -> None:
    stage = Stage()
    stage.pool.started[0].end = "killed by somebody"
    stage.pass_time(0.1)
    assert stage.pool.notes == [("told", "instance-0"), ("gone", 0, False)], "scheduler first"
    assert stage.states() == {"instance-0": "backing off", "instance-1": "running"}
    stage.pass_time(2.0)
    assert stage.states() == {"instance-2": "running", "instance-1": "running"}
    assert stage.pool.started[2].has_served
    (berth,) = (b for b in stage.supervisor.describe() if b.num_deaths)
    assert berth.last_failure == "killed by somebody"


def test_one_that_hangs_is_killed_before_anybody_is_told() -> None:
    stage = Stage()
    stage.pass_time(5.0)
    assert stage.pool.notes == []
    stage.pool.started[1].answers = False
    stage.pass_time(LIMITS.heartbeat_s + 1.0)
    assert stage.pool.started[1].was_killed
    assert stage.pool.notes == [("told", "instance-1"), ("gone", 1, False)]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_nothing_is_kept_of_one_that_is_gone(is_replaced: bool) -> None:
    """One that is gone would keep its machine busy, also while another finds no room elsewhere."""
    stage = Stage()
    stage.pool.boots_at_once = False
    gone = weakref.ref(stage.pool.started[1])
    stage.pass_time(1.0)
    stage.pool.started[1].answers = False
    stage.pass_time(0.4)
    assert stage.pool.notes == [], "it is only suspected"
    if is_replaced:
        stage.supervisor.replace("instance-1")
        stage.supervisor.terminate("instance-1")
    stage.pass_time(LIMITS.heartbeat_s + 1.0)
    assert ("gone", 1, is_replaced) in stage.pool.notes
    del stage.pool.started[1]
    gc.collect()
    assert gone() is None


def looks_in(stage: Stage, seconds: float) -> int:
    """How often the supervisor looks in so many seconds in which it is not woken."""
    until_s = stage.now_s + seconds
    num_looks = 0
    while stage.now_s < until_s:
        stage.now_s += stage.supervisor.pause_s
        stage.supervisor.tick()
        num_looks += 1
    return num_looks


def test_a_pool_in_which_nothing_happens_is_looked_at_seldom() -> None:
    stage = Stage()
    stage.pass_time(1.0)
    num_told: list[None] = []
    stage.supervisor.tell_of_changes(lambda: num_told.append(None))
    assert looks_in(stage, 60.0) <= 60.0 / QUIET_TICK_S + 2
    assert num_told == []
    stage.pool.started[1].answers = False
    stage.pass_time(1.0)
    assert stage.supervisor.pause_s == TICK_S, "one is silent"
    stage.pool.started[1].answers = True
    stage.pass_time(TICK_S)
    assert stage.supervisor.pause_s == QUIET_TICK_S
    stage.pool.started[1].end = "died"
    stage.supervisor.tick()
    assert (stage.supervisor.pause_s, len(num_told)) == (TICK_S, 1), "another is to come"


def test_it_does_not_rest_while_there_is_something_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    stage.pass_time(1.0)
    rests: list[bool] = []
    woken = stage.supervisor._woken

    def wait(timeout: float | None = None) -> bool:
        rests.append(not woken.is_set())
        return True

    monkeypatch.setattr(woken, "wait", wait)
    stage.supervisor.rest()
    stage.supervisor.launch("ordered")
    stage.supervisor.rest()
    tells = stage.pool.started[0].tells
    assert tells is not None
    tells()  # its process has ended
    stage.supervisor.rest()
    stage.supervisor.rest()
    assert rests == [True, False, False, True]


def test_nobody_is_silent_while_the_watcher_itself_stands_still() -> None:
    stage = Stage()
    stage.pass_time(1.0)
    for process in stage.pool.started.values():
        process.answers = False
    for _ in range(5):
        stage.now_s += 30.0
        stage.supervisor.tick()
    assert stage.pool.notes == []


def test_a_crash_loop_backs_off() -> None:
    stage = Stage()
    stage.pool.boots_at_once = True
    starts_s: list[float] = []
    num_started = len(stage.pool.started)
    stage.pool.started[0].end = "out of memory"
    while len(starts_s) < 9:
        stage.pass_time(TICK_S)
        if len(stage.pool.started) > num_started:
            num_started = len(stage.pool.started)
            starts_s.append(stage.now_s)
            stage.pool.started[max(stage.pool.started)].end = "out of memory"
    pauses_s = [after - before for before, after in itertools.pairwise(starts_s)]
    assert pauses_s == sorted(pauses_s)
    assert pauses_s[-1] == pytest.approx(MAX_BACK_OFF_S, abs=1.0)
    assert max(b.num_deaths for b in stage.supervisor.describe()) >= 8
    assert stage.states()["instance-1"] == "running", "the others are left alone"


def test_the_scheduler_can_wait_for_those_that_come_unasked_until_a_boot_fails() -> None:
    stage = Stage()
    stage.pool.boots_at_once = False
    assert stage.supervisor.num_replacing == 0
    for process in list(stage.pool.started.values()):
        process.end = "out of memory"
    stage.pass_time(0.5)
    assert stage.supervisor.num_replacing == 2, "they wait to be started again"
    stage.pass_time(2.0)
    assert set(stage.states().values()) == {"booting"}
    assert stage.supervisor.num_replacing == 2
    stage.pool.started[2].boot = "out of memory"
    stage.pool.started[3].boot = ""
    stage.pass_time(TICK_S)
    assert stage.supervisor.num_replacing == 0, "one has failed, and one has come"
    stage.supervisor.launch("ordered")
    stage.pass_time(0.5)
    assert stage.supervisor.num_replacing == 0


def test_one_that_lived_long_is_replaced_at_once() -> None:
    stage = Stage()
    stage.pass_time(120.0)
    stage.pool.started[0].end = "a cosmic ray"
    stage.pass_time(3 * TICK_S)
    assert 2 in stage.pool.started


def test_one_that_is_told_to_end_is_not_replaced() -> None:
    stage = Stage()
    stage.supervisor.terminate("instance-0")
    stage.pass_time(1.0)
    assert stage.pool.notes == [("told", "instance-0"), ("gone", 0, True)]
    assert stage.states() == {"instance-1": "running"}


def test_one_that_is_to_be_replaced_is() -> None:
    stage = Stage()
    stage.supervisor.replace("instance-0")
    stage.pass_time(1.0)
    assert stage.pool.notes == []
    stage.supervisor.terminate("instance-0")
    stage.pass_time(1.0)
    assert stage.states() == {"instance-2": "running", "instance-1": "running"}


def test_an_order_is_answered_with_an_instance_or_a_refusal() -> None:
    stage = Stage()
    for number in range(3):
        stage.supervisor.launch(f"l{number}")
    stage.pass_time(1.0)
    assert stage.pool.launch_ids == ["l0", "l1"]
    assert stage.pool.notes == [("refused", "l2")]
    assert len(stage.states()) == 4


def test_an_order_is_answered_by_one_that_waits_to_be_started_again() -> None:
    stage = Stage()
    stage.pool.started[0].end = "died"
    stage.pass_time(TICK_S)
    stage.supervisor.launch("l0")
    stage.pass_time(TICK_S)
    assert stage.pool.launch_ids == [], "whoever orders it, it backs off"
    stage.pass_time(2.0)
    assert stage.pool.launch_ids == ["l0"]
    assert len(stage.supervisor.describe()) == 2


def test_an_order_is_answered_by_one_that_boots_in_the_place_of_another() -> None:
    stage = Stage()
    stage.pool.boots_at_once = False
    stage.pool.started[0].end = "died"
    stage.pass_time(2.0)
    assert stage.states() == {"instance-2": "booting", "instance-1": "running"}
    stage.supervisor.launch("l0")
    stage.supervisor.launch("l1")
    stage.pass_time(1.0)
    assert stage.pool.notes[-1] == ("refused", "l0"), "it does not answer this order by name"
    assert stage.supervisor.num_replacing == 1, "the scheduler, which was refused it, counts it"
    assert stage.pool.launch_ids == [None, "l1"], "the second order is for one more"


def test_an_order_is_answered_by_the_replacement_of_one_that_drains() -> None:
    stage = Stage()
    stage.supervisor.replace("instance-0")
    stage.supervisor.launch("l0")
    stage.pass_time(1.0)
    stage.supervisor.terminate("instance-0")
    stage.pass_time(1.0)
    assert stage.states() == {"instance-1": "running", "instance-2": "running"}


@pytest.mark.parametrize("boots", [False, True], ids=["backs off", "boots"])
def test_one_too_many_does_not_come_back(boots: bool) -> None:
    """The scheduler has one instance, which is what an operator wants: it has nothing to do."""
    stage = Stage()
    stage.pool.boots_at_once = False
    stage.pool.started[0].end = "died"
    stage.pass_time(2.0 if boots else TICK_S)
    stage.supervisor.limit(1)
    stage.pass_time(5.0)
    assert stage.states() == {"instance-1": "running"}


def test_one_of_so_many_comes_back() -> None:
    stage = Stage()
    stage.pool.started[0].end = "died"
    stage.pass_time(TICK_S)
    stage.supervisor.limit(2)
    stage.pass_time(5.0)
    assert stage.states() == {"instance-2": "running", "instance-1": "running"}


def test_one_that_drains_is_not_replaced_if_there_are_enough_without_it() -> None:
    stage = Stage()
    stage.supervisor.replace("instance-0")
    stage.supervisor.limit(1)
    stage.supervisor.terminate("instance-0")
    stage.pass_time(5.0)
    assert stage.states() == {"instance-1": "running"}


@pytest.mark.parametrize("failure", ["no memory", None])
def test_an_order_whose_instance_does_not_boot_is_refused(failure: str | None) -> None:
    stage = Stage(boot_timeout_s=10.0)
    stage.pool.boots_at_once = False
    stage.supervisor.launch("l0")
    stage.pass_time(1.0)
    stage.pool.started[2].boot = failure
    stage.pass_time(11.0)
    assert stage.pool.notes == [("refused", "l0")]
    assert stage.pool.started[2].was_killed
    assert len(stage.supervisor.describe()) == 2


def test_orders_for_what_does_not_boot_back_off_as_well() -> None:
    """A scaling policy asks again as soon as it is refused."""
    stage = Stage()
    starts_s: list[float] = []
    stage.supervisor.launch("l0")
    while len(starts_s) < 5:
        num_started = len(stage.pool.started)
        num_refused = len(stage.pool.notes)
        stage.pass_time(TICK_S)
        if len(stage.pool.started) > num_started:
            starts_s.append(stage.now_s)
            stage.pool.started[max(stage.pool.started)].boot = "no room"
        if len(stage.pool.notes) > num_refused:
            stage.supervisor.launch(f"l{len(starts_s)}")
    pauses_s = [after - before for before, after in itertools.pairwise(starts_s)]
    assert pauses_s == pytest.approx([1.0, 2.0, 4.0, 8.0], abs=0.3)


def test_a_scheduler_that_did_not_hear_is_told_again() -> None:
    stage = Stage()
    stage.pool.scheduler_hears = False
    stage.pool.started[0].end = "died"
    stage.pass_time(0.2)
    assert stage.pool.notes.count(("gone", 0, False)) == 1
    assert stage.pool.notes.count(("told", "instance-0")) > 1
    stage.pool.scheduler_hears = True
    stage.pass_time(0.2)
    num_told = stage.pool.notes.count(("told", "instance-0"))
    stage.pass_time(0.5)
    assert stage.pool.notes.count(("told", "instance-0")) == num_told


def test_the_next_ping_follows_the_answer() -> None:
    num_pings = 0
    answered = False

    def ping() -> Callable[[], bool]:
        nonlocal num_pings
        num_pings += 1
        return lambda: answered

    silence = PingTimer(ping, interval_s=0.5)
    for _ in range(10):
        silence.tick(0.1)
    assert num_pings == 1
    assert silence.silent_s == pytest.approx(0.9)
    answered = True
    silence.tick(0.1)
    assert silence.silent_s == 0.0
    for _ in range(6):
        silence.tick(0.1)
    assert num_pings == 2


def test_beats_tell_the_silence_of_the_loop() -> None:
    keys = PoolKeys.generate()
    listener = HeartbeatListener("127.0.0.1", keys)
    answers = True

    def hear_until(holds: Callable[[float], bool]) -> None:
        while not (heard := listener.heard()) or not holds(heard[258]):
            assert heard.keys() <= {258}

    try:
        start_beating(listener.endpoint, 258, keys, lambda: lambda: answers)
        hear_until(lambda silence_s: silence_s == 0.0)
        answers = False
        hear_until(lambda silence_s: silence_s > 0.3)
        answers = True
        hear_until(lambda silence_s: silence_s == 0.0)
    finally:
        listener.close()
