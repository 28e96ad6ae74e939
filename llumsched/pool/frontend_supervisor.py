"""Keeps several frontends running: starts them, notices when one dies, and starts another.

    booting --serves--> serving --died--> leaving --forgotten, and back-off over--> booting ...

A frontend has a place, with a number that its successor takes over: instances send the outputs of a
request to the place that it came from. So everything that a dead one had must have ended at every
instance before another is started there.

This module does not know what a frontend serves, nor how its requests are ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llumsched.pool.backoff import BackOff
from llumsched.wire.names import frontend_id

logger = logging.getLogger(__name__)


class FrontendProcess(Protocol):
    """One process; nothing here waits."""

    @property
    def pid(self) -> int: ...

    def serves(self) -> bool:
        """True if the frontend has begun to take requests."""

    def end_reason(self) -> str | None:
        """``None`` while it runs, else why it ended."""

    def kill(self) -> None:
        """End it at once."""


class Host(Protocol):
    """Host of the frontend processes."""

    def start(self, index: int) -> FrontendProcess:
        """Begin to start a frontend in this place."""

    def forget(self, index: int) -> Callable[[], bool]:
        """Begin to end all requests of the frontend that died in this place; the returned function
        says, each time that it is called, whether they have ended everywhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendStatus:
    """``state`` is ``booting``, ``serving`` or ``backing off``; ``num_deaths`` counts those that
    ended here, ``last_failure`` says how the latest did. ``node`` is the machine of one that has
    joined, which may be ``leaving`` as well; empty for the launcher's own."""

    frontend_id: str
    pid: int | None
    state: str
    num_deaths: int
    last_failure: str
    node: str = ""


@dataclass(slots=True, kw_only=True)
class _Place:
    index: int
    process: FrontendProcess | None
    since_s: float
    is_serving: bool = False
    is_forgotten: Callable[[], bool] | None = None
    retry_at_s: float = 0.0
    back_off: BackOff = field(default_factory=BackOff)


class FrontendSupervisor:
    """Args:
    boot_timeout_s: how long a frontend may take until it serves.
    """

    def __init__(
        self,
        host: Host,
        num_frontends: int,
        *,
        boot_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host = host
        self._boot_timeout_s = boot_timeout_s
        self._clock = clock
        self._places = [
            _Place(index=index, process=host.start(index), since_s=clock())
            for index in range(num_frontends)
        ]

    def describe(self) -> Sequence[FrontendStatus]:
        """Every place, now."""
        return tuple(
            FrontendStatus(
                frontend_id=frontend_id(place.index),
                pid=place.process.pid if place.process is not None else None,
                state="backing off"
                if place.process is None
                else "serving"
                if place.is_serving
                else "booting",
                num_deaths=place.back_off.num_deaths,
                last_failure=place.back_off.last_failure,
            )
            for place in self._places
        )

    def tick(self) -> None:
        """Look at every place once."""
        now_s = self._clock()
        for place in self._places:
            if place.process is None:
                self._await_successor(place, now_s)
            else:
                self._look_at(place, place.process, now_s)

    def _look_at(self, place: _Place, process: FrontendProcess, now_s: float) -> None:
        reason = process.end_reason()
        if reason is None and not place.is_serving:
            if process.serves():
                place.is_serving = True
                place.since_s = now_s
            elif now_s - place.since_s > self._boot_timeout_s:
                reason = f"it did not serve within {self._boot_timeout_s:.0f} s"
        if reason is not None:
            self._died(place, process, reason, now_s)
        elif place.is_serving:
            place.back_off.lives(now_s - place.since_s)

    def _died(self, place: _Place, process: FrontendProcess, reason: str, now_s: float) -> None:
        process.kill()
        lived_s = now_s - place.since_s if place.is_serving else 0.0
        wait_s = place.back_off.died(reason, lived_s)
        place.process = None
        place.is_serving = False
        place.retry_at_s = now_s + wait_s
        logger.error(
            "%s ended: %s; its requests end, and another is started in %.0f s",
            frontend_id(place.index),
            reason,
            wait_s,
        )
        place.is_forgotten = self._host.forget(place.index)

    def _await_successor(self, place: _Place, now_s: float) -> None:
        # Asked at every tick: whoever forgets may have something to do for it.
        if place.is_forgotten is not None and place.is_forgotten():
            place.is_forgotten = None
        if place.is_forgotten is None and now_s >= place.retry_at_s:
            place.since_s = now_s
            place.process = self._host.start(place.index)
