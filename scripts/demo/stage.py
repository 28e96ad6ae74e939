"""Common ground of the acts: the terminal, a client, the operator's view, and checks.

Invariant: an act only reports. Whether the demo succeeded is decided by all checks of all acts.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from llumsched.commands._admin import AdminClient
from scripts.demo.client import Client
from scripts.demo.screen import Screen

POLL_INTERVAL_S = 0.1

OnMove = Callable[[str, str, str, int], None]
"""Called with the request's id, its source, its destination, and its tokens so far."""


class DemoFailed(Exception):
    """The demo cannot go on; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Something the demo claims, and whether it held in this run."""

    holds: bool
    text: str


@dataclass(slots=True)
class Watch:
    """Where each request is or last was, by the id its client knows, as of the last poll."""

    instance_of: dict[str, str] = field(default_factory=dict)
    num_moves: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Tools that every act works with."""

    screen: Screen
    client: Client
    admin: AdminClient

    async def instances(self) -> list[dict[str, Any]]:
        """Every instance with its load, as the admin API describes them."""
        found: list[dict[str, Any]] = (await asyncio.to_thread(self.admin.instances))["instances"]
        return found

    async def num_committed(self) -> int:
        """Migrations that have committed since the server started."""
        cluster = await asyncio.to_thread(self.admin.instances)
        number: int = cluster["migrations"].get("committed", 0)
        return number

    @contextlib.asynccontextmanager
    async def watching(self, on_move: OnMove | None = None) -> AsyncIterator[Watch]:
        """While the block lasts, follow every request from instance to instance."""
        watch = Watch()

        async def poll() -> None:
            while True:
                for request in await asyncio.to_thread(self.admin.requests):
                    request_id, now_on = request["external_id"], request["instance_id"]
                    if now_on is None:
                        continue
                    before = watch.instance_of.get(request_id, now_on)
                    watch.instance_of[request_id] = now_on
                    watch.num_moves[request_id] = request["num_moves"]
                    if on_move is not None and before != now_on:
                        on_move(request_id, before, now_on, request["num_output_tokens"])
                await asyncio.sleep(POLL_INTERVAL_S)

        async with beside(poll()):
            yield watch


@contextlib.asynccontextmanager
async def beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run ``work`` while the block lasts; what it raised is raised at the end of the block."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(
    condition: Callable[[], bool], *, timeout_s: float, otherwise: str | None = None
) -> None:
    """Wait for a condition.

    Raises:
        DemoFailed: it does not hold in time, and ``otherwise`` says what that means.
    """
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    while not condition():
        if loop.time() > deadline_s:
            if otherwise is None:
                return
            raise DemoFailed(f"{otherwise} within {timeout_s:.0f} s")
        await asyncio.sleep(POLL_INTERVAL_S)
