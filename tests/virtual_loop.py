"""An asyncio event loop without time or I/O: a test says what runs next, and which timer fires.

Coroutines, tasks, futures, events, queues and time-outs are asyncio's own. Callbacks run in the
order in which they were scheduled, one at a time; a timer fires when the test wants it to.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, cast


class Callback:
    """A scheduled call: the handle that asyncio gets of it."""

    __slots__ = ("args", "function", "is_cancelled", "run_context", "when_s")

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        context: contextvars.Context | None,
        when_s: float = 0.0,
    ) -> None:
        self.function = function
        self.args = args
        self.run_context = context or contextvars.copy_context()
        self.when_s = when_s
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def cancelled(self) -> bool:
        return self.is_cancelled

    def when(self) -> float:
        return self.when_s


class VirtualLoop:
    """As much of an event loop as asyncio's tasks and futures ask for, on one thread.

    Time stands still: timers fire in any order.
    """

    def __init__(self) -> None:
        self._ready: deque[Callback] = deque()
        self._timers: list[Callback] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self.failures: list[BaseException] = []
        """Exceptions of tasks."""

    # ---- for the test -----------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """True if nothing can run before a timer fires."""
        return not self._ready

    @property
    def num_tasks(self) -> int:
        """Tasks that are not over."""
        return len(self._tasks)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have code run as if by this loop."""
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(cast(Any, self))
        try:
            yield
        finally:
            asyncio._set_running_loop(before)

    def run_one(self) -> bool:
        """Run the next callback; False if there is none."""
        while self._ready:
            callback = self._ready.popleft()
            if not callback.is_cancelled:
                self._run(callback)
                return True
        return False

    def run_ready(self) -> bool:
        """Run callbacks until there is none; False if there was none."""
        if not self.run_one():
            return False
        while self.run_one():
            pass
        return True

    def timers(self) -> list[Callback]:
        """Timers that have not fired, the first to be due first."""
        self._timers = [timer for timer in self._timers if not timer.is_cancelled]
        return sorted(self._timers, key=lambda timer: timer.when_s)

    def fire(self, timer: Callback) -> None:
        """Let a timer fire next, before or after its time."""
        self._timers.remove(timer)
        self._run(timer)

    def end_tasks(self) -> None:
        """Cancel every task, and let each end."""
        while self._tasks:
            for task in list(self._tasks):
                task.cancel()
            if not self.run_ready():
                raise AssertionError(f"{len(self._tasks)} tasks do not end")

    def _run(self, callback: Callback) -> None:
        with self.running():
            callback.run_context.run(callback.function, *callback.args)
        if self.failures:
            raise self.failures[0]

    # ---- for asyncio ------------------------------------------------------------------------

    def time(self) -> float:
        return 0.0

    def get_debug(self) -> bool:
        return False

    def is_closed(self) -> bool:
        return False

    def call_soon(
        self, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> Callback:
        scheduled = Callback(callback, args, context)
        self._ready.append(scheduled)
        return scheduled

    call_soon_threadsafe = call_soon

    def call_later(
        self, delay: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> Callback:
        return self.call_at(delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> Callback:
        timer = Callback(callback, args, context, when)
        self._timers.append(timer)
        return timer

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=cast(Any, self))

    def create_task(self, coro: Coroutine[Any, Any, Any], **kwargs: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=cast(Any, self), **kwargs)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.failures.append(context.get("exception") or AssertionError(context["message"]))

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.failures.append(task.exception())  # type: ignore[arg-type]
