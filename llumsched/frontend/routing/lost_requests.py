"""Requests that have silently got lost are found and resumed.

A token that was sent may never arrive: an instance died between committing a migration and saying
so, or a connection broke. So instances are asked whether they have the requests from which nothing
has come for a while. The answer follows, on the same connection, everything they sent before it; a
request that is missing twice in a row, with nothing heard between, is nowhere.

This module does not know why a request is missing, nor how it is resumed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from llumsched.frontend.routing.routes import Routes

INTERVAL_S = 2.0
# Asked at a time; the rest at the next.
MAX_REQUESTS = 256

Position = tuple[int, int]


class EngineCalls(Protocol):
    """Calls on engines that the detector makes."""

    @property
    def instances(self) -> list[int]: ...

    async def missing(self, instance: int, request_ids: list[str]) -> list[str]:
        """The requests that an engine does not have. Raises ``ConnectionError`` if it dies."""


class LostRequestDetector:
    """Args:
    found_missing: hears of lost requests and the instance that should have had them.
    """

    def __init__(
        self,
        routes: Routes,
        instances: EngineCalls,
        found_missing: Callable[[list[str], int], None],
    ) -> None:
        self._routes = routes
        self._instances = instances
        self._found_missing = found_missing
        self._seen: dict[str, Position] = {}
        self._suspects: dict[str, Position] = {}
        self._asking: set[int] = set()

    async def run(self) -> None:
        """Look every few seconds, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await asyncio.sleep(INTERVAL_S)
                for instance, request_ids in self.silent().items():
                    if instance not in self._asking:
                        tasks.create_task(self.ask(instance, request_ids))

    def silent(self) -> dict[int, list[str]]:
        """By instance, the requests from which nothing has come since the last call."""
        found: dict[int, list[str]] = {}
        seen: dict[str, Position] = {}
        up = set(self._instances.instances)
        for request_id, route in self._routes:
            position = seen[request_id] = (route.placement_number, route.num_tokens)
            if (
                route.instance in up
                and self._seen.get(request_id) == position
                and len(found.get(route.instance, ())) < MAX_REQUESTS
            ):
                found.setdefault(route.instance, []).append(request_id)
        self._seen = seen
        self._suspects = {i: p for i, p in self._suspects.items() if seen.get(i) == p}
        return found

    async def ask(self, instance: int, request_ids: list[str]) -> None:
        """Ask an instance for these, and resume those that it was to have before as well."""
        self._asking.add(instance)
        try:
            missing = await self._instances.missing(instance, request_ids)
        except ConnectionError:
            return  # what it had is resumed anyway
        finally:
            self._asking.discard(instance)
        lost = []
        for request_id in missing:
            route = self._routes.get(request_id)
            if route is None or route.instance != instance:
                continue
            position = (route.placement_number, route.num_tokens)
            if position != self._seen.get(request_id):
                continue
            if self._suspects.get(request_id) == position:
                lost.append(request_id)
            else:
                self._suspects[request_id] = position
        for request_id in set(request_ids) - set(missing):
            self._suspects.pop(request_id, None)
        if lost:
            self._found_missing(lost, instance)
