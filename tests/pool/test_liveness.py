"""Which silence means death, played without a process and over real ones."""

from __future__ import annotations

import fcntl
import itertools
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llumsched.pool.instance_process import LocalProcess
from llumsched.pool.liveness import LivenessLimits, LivenessProbe, Watched
from llumsched.pool.process_activity import Work, work_of
from tests.campaigns import examples

TICK_S = 0.05
HEARTBEAT_S = 10.0
STEP_S = 60.0


@dataclass
class Process:
    """Uses as much of a processor as the test says."""

    share: float = 0.0
    is_ready: bool = False
    stopped: bool = False
    descendants: Process | None = None
    cpu_s: float = 0.0

    def pass_time(self, seconds: float) -> None:
        self.cpu_s += seconds * self.share
        if self.descendants is not None:
            self.descendants.pass_time(seconds)

    def is_stopped(self) -> bool:
        return self.stopped

    def work(self) -> Work:
        return Work(cpu_s=self.cpu_s, is_ready=self.is_ready)

    def has_descendants(self) -> bool:
        return self.descendants is not None

    def descendants_work(self) -> Work:
        assert self.descendants is not None
        return self.descendants.work()


Beat = Callable[[float], float | None]


def silent(now_s: float) -> float | None:
    """After its first beat."""
    return None if now_s > 0.1 else 0.0


def never_heard(_: float) -> float | None:
    return None


def beating(_: float) -> float | None:
    return 0.0


def loop_hangs(now_s: float) -> float | None:
    return now_s


def dies_after(
    process: Watched, beat: Beat, *, for_s: float = 3 * STEP_S
) -> tuple[float, str] | None:
    """When the process counts as dead, and why; ``beat(seconds)`` is what is heard of it."""
    signs = LivenessProbe(LivenessLimits(heartbeat_s=HEARTBEAT_S, step_s=STEP_S))
    for tick in range(1, round(for_s / TICK_S)):
        if isinstance(process, Process):
            process.pass_time(TICK_S)
        reason = signs.tick(TICK_S, beat(tick * TICK_S), process)
        if reason is not None:
            return tick * TICK_S, reason
    return None


BUSY = {
    "computes": Process(share=0.5),
    "waits for a processor or a disk": Process(is_ready=True),
    "waits for a compiler it has started": Process(descendants=Process(share=1.0)),
}


@pytest.mark.parametrize("process", [Process(), *BUSY.values()], ids=["idle", *BUSY])
def test_one_that_gives_signs_of_life_lives(process: Process) -> None:
    assert dies_after(process, beating) is None


@pytest.mark.parametrize("descendants", [None, Process()], ids=["alone", "with descendants"])
def test_one_that_is_silent_and_does_nothing_is_dead_after_a_while(
    descendants: Process | None,
) -> None:
    dead = dies_after(Process(share=0.02, descendants=descendants), silent)
    assert dead is not None
    assert dead[0] == pytest.approx(HEARTBEAT_S, abs=1.0)
    assert "hangs" in dead[1]


@pytest.mark.parametrize("process", BUSY.values(), ids=BUSY)
@pytest.mark.parametrize("beat", [silent, never_heard], ids=["silent", "never heard"])
def test_one_that_is_silent_and_works_has_as_long_as_a_step(process: Process, beat: Beat) -> None:
    """As on a machine that is starved, or short of memory."""
    dead = dies_after(process, beat)
    assert dead is not None
    assert dead[0] == pytest.approx(STEP_S, abs=1.0)


def test_one_that_was_never_heard_has_as_long_as_a_step() -> None:
    """An instance is told to serve by way of others, who may be busy."""
    dead = dies_after(Process(), never_heard)
    assert dead is not None
    assert dead[0] == pytest.approx(STEP_S, abs=1.0)


@pytest.mark.parametrize("process", [Process(), *BUSY.values()], ids=["idle", *BUSY])
def test_a_loop_has_as_long_as_a_step_whatever_its_process_does(process: Process) -> None:
    """One that uses no processor may wait for a lock, a file system or a GPU."""

    def long_steps(now_s: float) -> float | None:
        return now_s % (STEP_S - 1)

    assert dies_after(process, long_steps) is None
    dead = dies_after(process, loop_hangs)
    assert dead is not None
    assert dead[0] == pytest.approx(STEP_S, abs=2 * TICK_S)


def test_one_that_is_stopped_is_not_waited_for() -> None:
    process = Process(stopped=True, is_ready=True)
    dead = dies_after(process, silent)
    assert dead is not None
    assert dead[0] < 1.0


def test_one_that_is_stopped_for_a_moment_lives() -> None:
    """A look may be long after the one before: what was between was not seen."""
    signs = LivenessProbe(LivenessLimits(heartbeat_s=HEARTBEAT_S, step_s=STEP_S))
    process = Process()
    quiet: list[bool] = []
    for process.stopped in (False, True):
        assert signs.tick(1.0, 0.0, process) is None
        quiet.append(signs.is_quiet)
    assert quiet == [True, False], "the next look is soon"
    process.stopped = False
    assert signs.tick(1.0, 0.0, process) is None


@pytest.mark.parametrize("what", ["silence", "a loop that stands still", "a broken connection"])
def test_what_is_amiss_is_looked_at_more_often(what: str) -> None:
    signs = LivenessProbe(LivenessLimits(heartbeat_s=HEARTBEAT_S, step_s=STEP_S))
    quiet = [signs.is_quiet]
    signs.tick(TICK_S, 0.0, Process())
    quiet.append(signs.is_quiet)
    assert quiet == [False, True], "at first it has not beaten yet"
    if what == "a broken connection":
        signs.connection_broke()
    else:
        signs.tick(1.0, 1.0 if what == "a loop that stands still" else None, Process())
    assert not signs.is_quiet


def test_one_whose_connection_broke_is_dead_though_it_beats() -> None:
    signs = LivenessProbe(LivenessLimits(heartbeat_s=HEARTBEAT_S, step_s=STEP_S))
    signs.connection_broke()
    assert signs.tick(TICK_S, 0.0, Process()) is None, "Ray may know what it died of"
    reasons = [signs.tick(TICK_S, 0.0, Process()) for _ in range(10)]
    assert "its connection to the frontend broke" in reasons


def test_work_that_ends_in_a_hang_is_noticed() -> None:
    process = Process(share=1.0)

    def beat(now_s: float) -> float | None:
        if now_s > 25.0:
            process.share = 0.0
        return 0.0 if now_s < 2.0 else None

    dead = dies_after(process, beat)
    assert dead is not None
    assert dead[0] == pytest.approx(25.0 + HEARTBEAT_S, abs=1.5)


@settings(max_examples=examples(50))
@given(
    gaps=st.lists(st.integers(1, 15), min_size=20, max_size=60),
    share=st.floats(0.0, 1.0),
)
def test_beats_that_come_in_time_prove_life(gaps: list[int], share: float) -> None:
    """At most three quarters of a second apart, and none tells of a loop that stands still."""
    beats = set(itertools.accumulate(gaps))
    process = Process(share=share)
    signs = LivenessProbe(LivenessLimits(heartbeat_s=HEARTBEAT_S, step_s=STEP_S))
    for tick in range(1, max(beats) + 1):
        process.pass_time(TICK_S)
        assert signs.tick(TICK_S, 0.2 if tick in beats else None, process) is None


@pytest.fixture
def start() -> Iterator[Callable[[str], psutil.Process]]:
    processes: list[subprocess.Popen[bytes]] = []

    def start_program(program: str) -> psutil.Process:
        process = subprocess.Popen(
            [sys.executable, "-c", f"print(flush=True)\n{program}"], stdout=subprocess.PIPE
        )
        processes.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return psutil.Process(process.pid)

    yield start_program
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_a_process_that_computes_works(start: Callable[[str], psutil.Process]) -> None:
    process = start("while True: pass")
    before = work_of([process])
    while (now := work_of([process])).cpu_s == before.cpu_s:
        assert now.is_ready


def test_a_process_that_waits_does_nothing(start: Callable[[str], psutil.Process]) -> None:
    process = start("import threading; threading.Event().wait()")
    while work_of([process]).is_ready:
        pass  # on its way there
    assert work_of([process]).cpu_s < 5.0


LOCK = "import fcntl, sys, time\nfile = open(sys.argv[1], 'w')\n"
WAITS = "print(flush=True)\nfcntl.flock(file, fcntl.LOCK_EX)"
POLLS = """print(flush=True)
while True:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        time.sleep(0.05)
"""


@pytest.mark.parametrize("program", [WAITS, POLLS], ids=["waits", "polls"])
def test_a_loop_that_waits_for_the_lock_of_another_process_is_not_dead(
    tmp_path: Path, program: str
) -> None:
    """As one does whose sampler is compiled by another instance."""
    with (tmp_path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        command = [sys.executable, "-c", LOCK + program, str(tmp_path / "lock")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as waiting:
            assert waiting.stdout is not None
            waiting.stdout.readline()
            assert dies_after(LocalProcess(waiting.pid), loop_hangs, for_s=STEP_S - 1) is None
            waiting.kill()


def test_a_process_that_waits_for_its_children_one_after_the_other_works(
    start: Callable[[str], psutil.Process],
) -> None:
    child = "[sys.executable, '-c', 'sum(range(10**6))']"
    process = start(f"import subprocess, sys\nwhile True: subprocess.run({child})")
    before = work_of([process])
    while work_of([process]).cpu_s - before.cpu_s < 0.05:
        assert process.is_running()


def test_one_that_is_gone_does_nothing(start: Callable[[str], psutil.Process]) -> None:
    process = start("")
    process.wait(30)
    assert work_of([process]) == Work(cpu_s=0.0, is_ready=False)
