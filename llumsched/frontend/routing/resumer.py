"""Requests whose instance died go on at another, from the tokens their clients have.

For each such request a task asks the scheduler for an instance, hands it prompt, parameters and the
tokens passed on so far, and has old copies aborted. If that instance dies too, it begins again.

Invariants: a request is resumed by one task at a time; whatever an earlier instance still sends is
not passed on (``routes``); a request that makes its instances die is given up after
``MAX_FRUITLESS_RESUMPTIONS`` without a token between, so that it cannot take down the pool.
This module does not know how a loss is noticed.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import msgspec
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine import EngineCoreRequest

from llumsched.engine.vllm.migration.resumption import state_to_resume, why_not_resumable
from llumsched.frontend.routing.routes import Route, Routes
from llumsched.wire.names import instance_name

logger = logging.getLogger(__name__)

MAX_FRUITLESS_RESUMPTIONS = 3
# An instance that the scheduler chose and this frontend does not know of has just died, or is just
# coming up.
UNKNOWN_INSTANCE_DELAY_S = 0.05


class Placer(Protocol):
    """Chooses the instance of a request; the link to the global scheduler."""

    async def place(
        self, request: EngineCoreRequest, *, lost: int | None = None, num_output_tokens: int = 0
    ) -> int:
        """The ZMQ index of the chosen instance; raises what the client should see as an error."""


class ResumptionTargets(Protocol):
    """The frontend's connections to the instances."""

    def is_up(self, instance: int) -> bool: ...

    def is_gone(self, instance: int) -> bool:
        """True if the instance was reported lost: one not up may also be about to connect."""

    async def add(self, instance: int, request: EngineCoreRequest) -> None:
        """Send a request as new."""

    async def resume(self, instance: int, state: bytes) -> str | None:
        """Have a request taken over; why not, or ``None``. Raises if the instance dies."""

    def abort_soon(self, instance: int, request_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class _Kept:
    """A request as it was sent, and its context, which has the scheduler's hints."""

    request: EngineCoreRequest
    context: contextvars.Context


class Resumer:
    """Args:
    give_up: ends a request with an error; the second argument says why.
    """

    def __init__(
        self,
        routes: Routes,
        placer: Placer,
        instances: ResumptionTargets,
        give_up: Callable[[str, str], None],
        unknown_instance_delay_s: float = UNKNOWN_INSTANCE_DELAY_S,
    ) -> None:
        self._unknown_instance_delay_s = unknown_instance_delay_s
        self._routes = routes
        self._placer = placer
        self._instances = instances
        self._give_up = give_up
        self._kept: dict[str, _Kept] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def keep(self, request: EngineCoreRequest) -> None:
        """Remember a request, in its own context, until it is forgotten."""
        self._kept[request.request_id] = _Kept(request, contextvars.copy_context())

    def kept(self, request_id: str) -> EngineCoreRequest | None:
        """The request as it was sent."""
        found = self._kept.get(request_id)
        return found.request if found is not None else None

    def forget(self, request_id: str) -> None:
        """The request is over."""
        self._kept.pop(request_id, None)
        task = self._tasks.pop(request_id, None)
        if task is not None and task is not _current_task():
            task.cancel()

    def resume(self, request_ids: Iterable[str], lost: int | None) -> None:
        """Resume requests that have begun again (``Routes.lose``), as ``lost`` died with them."""
        for request_id in request_ids:
            route, kept = self._routes.get(request_id), self._kept.get(request_id)
            if route is None:
                continue
            if kept is None:
                continue  # it has not been sent anywhere yet
            before = self._tasks.pop(request_id, None)
            if before is not None and before is not _current_task():
                before.cancel()
            if route.num_fruitless_resumptions > MAX_FRUITLESS_RESUMPTIONS:
                self._give_up(
                    request_id,
                    f"{route.num_fruitless_resumptions} instances in a row died with it",
                )
                continue
            task = asyncio.get_running_loop().create_task(
                self._run(route, kept.request, lost), context=kept.context.copy()
            )
            self._tasks[request_id] = task

    async def _run(self, route: Route, request: EngineCoreRequest, lost: int | None) -> None:
        request_id, placement_number = request.request_id, route.placement_number
        try:
            refused = await self._hand_over(route, request, lost)
        except GracefulHTTPError as error:
            refused = str(error)
        except ConnectionError as error:
            logger.warning(
                "Request %s is placed again: %s",
                request_id,
                error,
                extra={"request_id": request_id},
            )
            if self._is_still(route, request_id, placement_number):
                instance = route.instance
                gone = instance is not None and self._instances.is_gone(instance)
                self._routes.begin_again(route)
                self.resume([request_id], instance if gone else None)
            return
        except Exception as error:
            logger.exception("Request %s could not be resumed", request_id)
            refused = f"failed: {error!r}"
        if self._tasks.get(request_id) is _current_task():
            del self._tasks[request_id]
        if refused is not None and self._is_still(route, request_id, placement_number):
            self._give_up(request_id, refused)

    async def _hand_over(
        self, route: Route, request: EngineCoreRequest, lost: int | None
    ) -> str | None:
        """Why the request cannot go on, or ``None`` when it does."""
        request_id, placement_number = request.request_id, route.placement_number
        origin = lost
        obstacle = why_not_resumable(request)
        if obstacle is not None and route.num_tokens:
            return obstacle
        while True:
            instance = await self._placer.place(
                request, lost=lost, num_output_tokens=route.num_tokens
            )
            if self._instances.is_up(instance):
                break
            # The scheduler answers no more for what it is told lost until it knows of that loss.
            lost = instance if self._instances.is_gone(instance) else None
            await asyncio.sleep(self._unknown_instance_delay_s)
        if not self._is_still(route, request_id, placement_number):
            return None
        stale_copies = self._routes.settle(route, instance, is_announced=obstacle is None)
        for other in stale_copies:
            self._instances.abort_soon(other, request_id)
        logger.info(
            "Request %s goes on at %s from token %d, since %s",
            request_id,
            instance_name(instance),
            route.num_tokens,
            "its instance was lost" if origin is None else f"{instance_name(origin)} was lost",
            extra={"request_id": request_id, "instance_id": instance_name(instance)},
        )
        if obstacle is not None:
            await self._instances.add(instance, request)
            return None
        state = state_to_resume(request, list(route.output_token_ids), placement_number)
        return await self._instances.resume(instance, msgspec.msgpack.encode(state))

    def _is_still(self, route: Route, request_id: str, placement_number: int) -> bool:
        """True if nothing has happened to the request meanwhile."""
        return self._routes.get(request_id) is route and route.placement_number == placement_number


def _current_task() -> asyncio.Task[None] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
