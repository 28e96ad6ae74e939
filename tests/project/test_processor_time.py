"""Benchmarks say whose processor time it is: a thread of a library is not one of ours."""

from __future__ import annotations

import os
import time

import pytest

from benchmarks import _cpu


@pytest.mark.parametrize(
    ("part", "thread", "is_actors_first", "owner"),
    [
        (_cpu.INSTANCES, "ray::IDLE", False, _cpu.INSTANCES),
        (_cpu.INSTANCES, "ray::Instance", True, _cpu.RAY_WITHIN),
        (_cpu.INSTANCES, "gloo_tcp_loop", False, _cpu.GLOO),
        (_cpu.SCHEDULER, "client.poll0", False, _cpu.RAY_WITHIN),
        (_cpu.LAUNCHER, "worker.io", False, _cpu.RAY_WITHIN),
        (_cpu.LAUNCHER, "python", False, _cpu.LAUNCHER),
        (_cpu.ENGINE, "gloo_tcp_loop", False, _cpu.GLOO),
        (_cpu.FRONTENDS, "ZMQbg/IO/0", False, _cpu.FRONTENDS),
        (_cpu.RAY, "worker.io", False, _cpu.RAY),
    ],
)
def test_a_threads_time_is_that_of_whoever_made_it(
    part: str, thread: str, is_actors_first: bool, owner: str
) -> None:
    assert _cpu._owner(part, thread, is_actors_first) == owner


def test_time_that_a_process_uses_is_counted() -> None:
    """The test's process is no server of ours, so all that it uses is the server's."""
    before_s = _cpu.used_s(os.getpid())[_cpu.FRONTENDS]
    until_s = time.process_time() + 0.05
    while time.process_time() < until_s:
        pass
    assert _cpu.used_s(os.getpid())[_cpu.FRONTENDS] >= before_s + 0.02
