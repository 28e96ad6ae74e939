"""Requests that are nowhere are found; those that only wait are left alone."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from llumsched.frontend.routing.lost_requests import LostRequestDetector
from llumsched.frontend.routing.routes import Routes


@dataclass
class Output:
    request_id: str
    new_token_ids: list[int]
    finish_reason: Any = None


@dataclass
class World:
    """One instance, which has ``has``."""

    has: set[str]
    is_dead: bool = False
    found: list[tuple[list[str], int]] = field(default_factory=list)
    instances: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        self.routes = Routes()
        self.auditor = LostRequestDetector(
            self.routes, self, lambda ids, i: self.found.append((ids, i))
        )
        for request_id in ("here", "nowhere"):
            self.routes.open(request_id).instance = 0

    async def missing(self, instance: int, request_ids: list[str]) -> list[str]:
        if self.is_dead:
            raise ConnectionError("it died")
        return [request_id for request_id in request_ids if request_id not in self.has]

    def look(self) -> list[str]:
        """One round; which requests were asked for."""
        asked: list[str] = []
        for instance, request_ids in self.auditor.silent().items():
            asked += request_ids
            asyncio.run(self.auditor.ask(instance, request_ids))
        return asked


def test_a_request_that_is_missing_twice_is_lost() -> None:
    world = World({"here"})
    assert world.look() == [], "silence is only known from the second look on"
    assert world.look() == ["here", "nowhere"]
    assert world.found == []
    world.look()
    assert world.found == [(["nowhere"], 0)]


def test_a_token_between_clears_a_request() -> None:
    """The request was on its way to another instance, or the answer and the token crossed."""
    world = World({"here"})
    for _ in range(4):
        world.look()
        world.routes.pass_on(0, [Output("nowhere", [1])])
    assert world.found == []


def test_an_instance_that_dies_is_not_what_an_audit_is_for() -> None:
    world = World(set(), is_dead=True)
    for _ in range(4):
        world.look()
    assert world.found == []


def test_what_an_instance_has_may_wait_for_ever() -> None:
    world = World({"here", "nowhere"})
    for _ in range(4):
        world.look()
    assert world.found == []
