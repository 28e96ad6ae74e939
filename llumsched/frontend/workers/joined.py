"""Frontends that have joined, as the launcher keeps them: each has a place that no other ever gets.

    admitted --booted--> serving --gone--> forgotten

Nobody here starts another in the place of one that is gone: whoever started it does, and it joins
as another. What it has left is ended as for the launcher's own (``pool.frontend_cleanup``).
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from llumsched.frontend.workers.launcher_server import LauncherServer
from llumsched.frontend.workers.messages import Admitted, JoinPool
from llumsched.frontend.workers.remote_channel import RemoteChannel
from llumsched.pool.frontend_supervisor import FrontendStatus
from llumsched.wire.control import encode
from llumsched.wire.names import frontend_id

logger = logging.getLogger(__name__)


class FrontendConnections(Protocol):
    """Connections of the instances to frontends; calls return at once."""

    def connect_frontend(self, client_index: int, input_address: str, output_address: str) -> None:
        """Have every instance, also those to come, serve a frontend that has joined."""

    def forget_frontend(self, client_index: int) -> Callable[[], bool]:
        """Begin to end all that a dead frontend has left; whether it has, each time it is asked."""


@dataclass(slots=True, kw_only=True)
class _Guest:
    channel: RemoteChannel
    wish: JoinPool
    is_forgotten: Callable[[], bool] | None = None


class JoinedFrontends:
    """Args:
    first_index: the place of the first to join, after those of the launcher's own.
    """

    def __init__(self, hub: LauncherServer, pool: FrontendConnections, first_index: int) -> None:
        self._hub = hub
        self._pool = pool
        self._indices = itertools.count(first_index)
        self._guests: dict[int, _Guest] = {}
        self._lock = threading.Lock()

    def admit(self, wish: JoinPool, channel: RemoteChannel) -> None:
        """Give a frontend its place, and have instances serve it; from any thread."""
        with self._lock:
            index = next(self._indices)
            self._guests[index] = _Guest(channel=channel, wish=wish)
        channel.send(encode(Admitted(client_index=index)))
        self._pool.connect_frontend(index, wish.input_address, wish.output_address)
        self._hub.join(index, channel)
        logger.info("%s has joined, as process %d of %s", frontend_id(index), wish.pid, wish.node)

    def tick(self) -> None:
        """Begin to forget those that are gone, and go on with it."""
        with self._lock:
            guests = list(self._guests.items())
        for index, guest in guests:
            if guest.channel.is_closed and guest.is_forgotten is None:
                logger.warning("%s is gone; its requests end", frontend_id(index))
                self._hub.leave(index)
                guest.is_forgotten = self._pool.forget_frontend(index)
            if guest.is_forgotten is not None and guest.is_forgotten():
                with self._lock:
                    del self._guests[index]

    @property
    def is_quiet(self) -> bool:
        """True while none boots, nor is being forgotten."""
        return all(status.state == "serving" for status in self.describe())

    def describe(self) -> Sequence[FrontendStatus]:
        """Every one that is not forgotten."""
        with self._lock:
            guests = list(self._guests.items())
        return tuple(
            FrontendStatus(
                frontend_id=frontend_id(index),
                pid=guest.wish.pid,
                state="leaving"
                if guest.channel.is_closed
                else "serving"
                if self._hub.serves(index)
                else "booting",
                num_deaths=0,
                last_failure="",
                node=guest.wish.node,
            )
            for index, guest in guests
        )
