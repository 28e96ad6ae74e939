"""Instructions to an instance."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from llumsched.frontend.options import instance_plan as plans


def config(num_workers: int = 1) -> Any:
    return SimpleNamespace(parallel_config=SimpleNamespace(world_size=num_workers))


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(4)))
    for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("num_instances", "num_cores"),
    # One core is the frontend's while there are enough; five threads do not fit on four.
    [(1, 3), (2, 1), (4, 1), (5, 0)],
)
def test_cores_of_an_instance(num_instances: int, num_cores: int) -> None:
    assert plans.cores_of_instance(config(), num_instances) == num_cores


def test_instances_share_cores_where_vllm_is_told_what_to_bind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    assert plans.cores_of_instance(config(), 2) == 0


def test_workers_of_one_instance_share_cores() -> None:
    assert plans.cores_of_instance(config(num_workers=2), 1) == 0
