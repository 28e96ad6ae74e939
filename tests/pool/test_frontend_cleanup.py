"""Requests of a dead frontend are ended everywhere before the word is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import ray

from llumsched.pool.frontend_cleanup import ANSWERS_TIMEOUT_TICKS, FrontendLoss


class Call:
    """A remote call that is answered when the test says so."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.result: Any = None
        self.is_done = False

    def answer(self, result: Any = None) -> None:
        self.result, self.is_done = result, True


class Remote:
    """The one method of an actor that is called here."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.abort_client = self.frontend_lost = self

    def remote(self, *args: Any) -> Call:
        self.calls.append(Call(*args))
        return self.calls[-1]


@pytest.fixture(autouse=True)
def _calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(calls: Sequence[Call], **_: Any) -> tuple[list[Call], list[Call]]:
        return [c for c in calls if c.is_done], [c for c in calls if not c.is_done]

    def get(call: Call) -> Any:
        if isinstance(call.result, Exception):
            raise call.result
        return call.result

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)


def test_the_scheduler_is_told_what_instances_had() -> None:
    a, b, scheduler = Remote(), Remote(), Remote()
    loss = FrontendLoss([a, b], scheduler, 1, "frontend-1")
    assert [remote.calls[0].args for remote in (a, b)] == [(1,), (1,)]
    a.calls[0].answer(["r1"])
    assert not loss.is_settled()
    assert not scheduler.calls
    b.calls[0].answer(["r2", "r3"])
    assert not loss.is_settled()
    assert scheduler.calls[0].args == ("frontend-1", ["r1", "r2", "r3"])
    assert not loss.is_settled()
    scheduler.calls[0].answer()
    assert loss.is_settled()


def test_an_instance_that_hangs_is_awaited_though_the_scheduler_knows() -> None:
    busy, scheduler = Remote(), Remote()
    loss = FrontendLoss([busy], scheduler, 0, "frontend-0")
    for _ in range(ANSWERS_TIMEOUT_TICKS):
        assert not loss.is_settled()
    scheduler.calls[0].answer()
    assert scheduler.calls[0].args == ("frontend-0", [])
    assert not loss.is_settled()
    busy.calls[0].answer(["r1"])
    assert not loss.is_settled()
    scheduler.calls[1].answer()
    assert scheduler.calls[1].args == ("frontend-0", ["r1"])
    assert loss.is_settled()


def test_the_dead_need_not_answer() -> None:
    dead, scheduler = Remote(), Remote()
    loss = FrontendLoss([dead], scheduler, 0, "frontend-0")
    dead.calls[0].answer(ray.exceptions.ActorDiedError())
    assert not loss.is_settled()
    scheduler.calls[0].answer(ray.exceptions.ActorDiedError())
    assert not loss.is_settled()
    scheduler.calls[1].answer()
    assert loss.is_settled()
