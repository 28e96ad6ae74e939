"""Processes that a server has started end with it, also those with another parent by then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llumsched.pool.orphans import POOL_ID, OrphanWatch, members

PATIENCE_S = 30.0

# A server with a child, and a grandchild that is nobody's: its parent has ended.
SERVER = """
import os, subprocess, sys, time
from llumsched.pool.orphans import OrphanWatch

watch = OrphanWatch()
watch.start()
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(sleep)
apart = "start_new_session=True, stdout=subprocess.DEVNULL"
orphan = f"import subprocess; print(subprocess.Popen({sleep}, {apart}).pid)"
orphan_pid = subprocess.check_output([sys.executable, "-c", orphan], text=True).strip()
print(child.pid, orphan_pid, watch.pid, flush=True)
if sys.argv[1] == "close":
    sys.stdin.read()
    watch.close()
else:
    time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def await_end_of(pids: list[int]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while left := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline_s, f"{left} live on"
        time.sleep(0.05)


@pytest.fixture(params=["kill", "close"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, request.param],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        # It reads what ``sys.stdout`` is buffered for; and whoever runs the tests may be a pool.
        env={**os.environ, POOL_ID: "another", "PYTHONUNBUFFERED": "1"},
    ) as process:
        yield request.param, process
        process.kill()


def test_nothing_outlives_the_server(server: tuple[str, subprocess.Popen[str]]) -> None:
    how, process = server
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert all(is_alive(pid) for pid in pids)
    if how == "kill":
        process.send_signal(signal.SIGKILL)
    else:
        assert process.stdin is not None
        process.stdin.close()
        pids.append(process.pid)
    await_end_of(pids)


def test_others_are_left_alone() -> None:
    """Also the server itself, which ends by itself."""
    watch = OrphanWatch()
    watch.start()
    pool_id = os.environ[POOL_ID]
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as ours:
        deadline_s = time.monotonic() + PATIENCE_S
        while members(pool_id) != [ours.pid]:
            assert time.monotonic() < deadline_s
        watch.close()
        assert ours.wait(PATIENCE_S) == -signal.SIGKILL
    assert POOL_ID not in os.environ
    watch.close()
