"""Instances that go, told to those who have to know."""

from __future__ import annotations

import asyncio
from typing import Protocol

from llumsched.frontend.routing.scheduler_client import SchedulerClient
from llumsched.wire.names import instance_name


class Client(Protocol):
    """Sender of requests to instances."""

    def instance_lost(
        self, instance: int, *, expected: bool = False, is_counted: bool = True
    ) -> None:
        """An instance is dead, or was ended: what it had goes on elsewhere."""


class InstanceEventBridge:
    """Tells frontend and scheduler, on the loop, of instances that are gone or will not come.

    Its methods may be called from any thread.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, client: Client, link: SchedulerClient
    ) -> None:
        self._loop = loop
        self._client = client
        self._link = link

    def gone(self, engine_index: int, *, expected: bool, is_counted: bool = True) -> None:
        """An instance is gone; of several frontends one counts it."""

        def tell() -> None:
            self._client.instance_lost(engine_index, expected=expected, is_counted=is_counted)
            self._link.instance_gone(instance_name(engine_index))

        self._loop.call_soon_threadsafe(tell)

    def refused(self, launch_id: str, reason: str) -> None:
        """An instance that the scheduler ordered will not come."""
        self._loop.call_soon_threadsafe(self._link.launch_refused, launch_id, reason)
