"""Common ground of both ends of a migration: an asyncio loop, and the engine's thread beside it.

A host belongs to one migration and drives one record. Events are taken in on the loop, one at a
time; work for the engine goes to its thread and comes back to the loop. Knows neither table: what a
command means is the business of ``source`` and ``destination``.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from llumsched.core.migration.driver import End, MigrationDriver, Record
from llumsched.core.migration.table import IllegalTransition

logger = logging.getLogger(__name__)

RecordT = TypeVar("RecordT", bound=Record)
EventT = TypeVar("EventT")
CommandT = TypeVar("CommandT")
T = TypeVar("T")

Call = Callable[[Callable[[], Any]], Future[Any]]
"""Runs a closure on the engine's thread."""


class MigrationHost(ABC, Generic[RecordT, EventT, CommandT]):
    """One end of one migration in an instance's process. Every method runs on the loop."""

    def __init__(self, end: End[RecordT, EventT, CommandT], migration_id: str, call: Call) -> None:
        self.migration_id = migration_id
        self._end = end
        self._call = call
        self._driver: MigrationDriver[RecordT, EventT, CommandT] | None = None
        self._early: list[EventT] = []
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def has_begun(self) -> bool:
        """True once there is a record."""
        return self._driver is not None

    @property
    def record(self) -> RecordT:
        """Record of the migration, once it has begun."""
        assert self._driver is not None
        return self._driver.record

    def begin(self, record: RecordT, commands: tuple[CommandT, ...] = ()) -> None:
        """Start from ``record``; events that came before are taken in now."""
        self._driver = MigrationDriver(self._end, self, record)
        self._driver.begin(commands)
        early, self._early = self._early, []
        for event in early:
            self.post(event)

    def post(self, event: EventT) -> None:
        """Take in an event."""
        if self._driver is None:
            self._early.append(event)
            return
        try:
            self._driver.handle(event)
        except IllegalTransition as error:
            # A peer that breaks the protocol, or a defect here. It harms this migration only: the
            # table has changed nothing, and the timer of this state ends the migration in order.
            logger.error("Migration %s: %s", self.migration_id, error)
        self.advanced()

    def advanced(self) -> None:
        """Called after each event; the record may be a new one."""

    @abstractmethod
    def execute(self, command: CommandT) -> None:
        """Carry a command out, or queue it behind those before it."""

    def set_timer(self, timeout_s: float, event: EventT) -> None:
        self.clear_timer()
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self.post, event)

    def clear_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def stop(self) -> None:
        """End the timer and every task."""
        self.clear_timer()
        for task in list(self._tasks):
            task.cancel()

    async def _engine(self, function: Callable[[], T]) -> T:
        result: T = await asyncio.wrap_future(self._call(function))
        return result

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("Migration %s failed", self.migration_id, exc_info=error)
            self.failed(error)

    def failed(self, error: BaseException) -> None:
        """Called when a task has failed, which was not foreseen."""
