"""Operators' commands against a pool that does what it is asked, a little later."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from llumsched import cli
from llumsched.commands import _waiting
from tests.commands.stub import error, make_berth, make_instance, make_load, serving


class Pool(dict[str, tuple[int, object]]):
    """The admin API's answers: every look at the instances finds it one step further."""

    def __init__(self, *instance_ids: str) -> None:
        super().__init__()
        self.instance_ids = list(instance_ids)
        self.draining: dict[str, bool] = {}
        self.wanted = len(instance_ids)
        self.fewest = len(instance_ids)
        self._next = 10

    def get(self, path: str, default: Any = None) -> Any:
        if path == "/llumsched/scale":
            self.wanted = 2
            return 202, {"num_instances": 2}
        if path.endswith("/drain"):
            instance_id = path.split("/")[-2]
            if instance_id not in self.instance_ids:
                return error(404, f"No instance '{instance_id}' is running.")
            self.draining[instance_id] = True
            return 202, {}
        if path == "/llumsched/instances":
            answer = self._describe()
            self._go_on()
            return 200, answer
        return default

    def _describe(self) -> dict[str, Any]:
        return {
            "policy": "latency",
            "migrations": {},
            "instances": [
                make_instance(i, make_load(), state="draining" if i in self.draining else "serving")
                for i in self.instance_ids
            ],
            "berths": [make_berth(i) for i in self.instance_ids],
        }

    def _go_on(self) -> None:
        for instance_id in list(self.draining):
            self.instance_ids.remove(instance_id)
            del self.draining[instance_id]
        self.fewest = min(self.fewest, len(self.instance_ids))
        if len(self.instance_ids) < self.wanted:
            self._next += 1
            self.instance_ids.append(f"instance-{self._next}")


@contextlib.contextmanager
def served(pool: Pool) -> Iterator[str]:
    with serving({}) as stub:
        stub.answers = pool
        yield stub.url


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_waiting, "POLL_INTERVAL_S", 0.001)


def test_drain_waits_for_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    pool = Pool("instance-0", "instance-1")
    pool.wanted = 1
    with served(pool) as url:
        assert cli.main(["drain", "instance-0", "--url", url]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "instance-0 takes no more requests",
        "instance-0 has ended",
    ]
    assert pool.instance_ids == ["instance-1"]


def test_the_instances_of_a_machine_that_goes_are_drained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pool = Pool("instance-0", "instance-1")
    pool.wanted = 0
    with served(pool) as url:
        assert cli.main(["drain", "--node", "10.0.0.1", "--url", url]) == 0
        assert pool.instance_ids == []
        assert cli.main(["drain", "--node", "10.0.0.9", "--url", url]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "instance-0 takes no more requests",
        "instance-1 takes no more requests",
        "instance-0, instance-1 have ended",
        "no instance runs on 10.0.0.9",
    ]


def test_an_instance_that_is_not_there_cannot_be_drained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with served(Pool("instance-0")) as url:
        assert cli.main(["drain", "instance-7", "--url", url]) == 1
    assert "No instance 'instance-7' is running" in capsys.readouterr().err


def test_scale_waits_until_there_are_so_many(capsys: pytest.CaptureFixture[str]) -> None:
    with served(Pool("instance-0")) as url:
        assert cli.main(["scale", "2", "--url", url]) == 0
    assert capsys.readouterr().out == "running: instance-0, instance-11\n"


def test_restart_replaces_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    pool = Pool("instance-0", "instance-1", "instance-2")
    with served(pool) as url:
        assert cli.main(["restart", "--url", url]) == 0
    assert pool.instance_ids == ["instance-11", "instance-12", "instance-13"]
    assert pool.fewest == 2, "never two at a time"
    assert capsys.readouterr().out.splitlines()[0] == "[1/3] draining instance-0"


def test_restart_of_the_only_instance_has_another_first() -> None:
    pool = Pool("instance-0")
    with served(pool) as url:
        pool.wanted = 1
        assert cli.main(["restart", "--url", url]) == 0
    assert pool.fewest == 1
    assert "instance-0" not in pool.instance_ids


def test_what_does_not_come_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    pool = Pool("instance-0")
    with served(pool) as url:
        assert cli.main(["scale", "5", "--timeout", "0.01", "--url", url]) == 1
    assert "5 instances" in capsys.readouterr().err
