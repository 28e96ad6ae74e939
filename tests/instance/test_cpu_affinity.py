"""Cores that are taken, by processes that end in any way."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llumsched.instance.cpu_affinity import OwnCores

TAKE_ONE = """
import sys
from pathlib import Path
from llumsched.instance.cpu_affinity import OwnCores
own = OwnCores(1, Path(sys.argv[1]))
print(*own.cores, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3, 4, 5, 6})


@pytest.mark.usefixtures("four_cores")
def test_no_core_is_taken_twice(tmp_path: Path) -> None:
    first, second = OwnCores(2, tmp_path), OwnCores(1, tmp_path)
    assert first.cores == {5, 6}
    assert second.cores == {4}
    first.release()
    assert OwnCores(2, tmp_path).cores == {5, 6}


@pytest.mark.usefixtures("four_cores")
def test_too_few_are_none(tmp_path: Path) -> None:
    first = OwnCores(3, tmp_path)
    assert OwnCores(2, tmp_path).cores == frozenset()
    # And the one that was free still is.
    assert OwnCores(1, tmp_path).cores == {3}
    assert first.cores == {4, 5, 6}


def test_a_folder_that_cannot_be_used_keeps_nobody_from_serving(tmp_path: Path) -> None:
    taken = tmp_path / "a file"
    taken.touch()
    own = OwnCores(1, taken)
    assert own.cores == frozenset()
    own.bind()  # binds nothing
    assert OwnCores(1, tmp_path / "no" / "such" / "folder").cores == frozenset()


def test_what_a_killed_process_had_is_free_again(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TAKE_ONE, str(tmp_path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    taken = {int(core) for core in other.stdout.readline().split()}
    num_cores = len(os.sched_getaffinity(0))
    assert len(taken) == 1
    assert OwnCores(num_cores, tmp_path).cores == frozenset()
    other.kill()
    other.communicate(timeout=30)
    assert OwnCores(num_cores, tmp_path).cores == os.sched_getaffinity(0)


def test_every_thread_is_bound(tmp_path: Path) -> None:
    """Also those that ran before."""
    before = os.sched_getaffinity(0)
    waiting, seen = threading.Event(), []

    def look() -> None:
        waiting.wait(30)
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=look)
    thread.start()
    own = OwnCores(1, tmp_path)
    try:
        own.bind()
        waiting.set()
        thread.join(30)
        assert seen == [own.cores]
        assert os.sched_getaffinity(0) == own.cores
    finally:
        waiting.set()
        for task in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(task.name), before)
