"""A frontend's side of the channel to its launcher: how the pool is, and what is wanted of it.

A thread receives, also while the frontend is still being built; what happens to instances meanwhile
is kept for when there is somebody to tell. Without its launcher a frontend ends.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence

from llumsched.frontend.http.admin import requests_of
from llumsched.frontend.routing.client import RoutingEngineClient
from llumsched.frontend.routing.instance_events import InstanceEventBridge
from llumsched.frontend.routing.status import RequestStatus
from llumsched.frontend.workers.channel import ChannelClosed, ChannelEnd
from llumsched.frontend.workers.messages import (
    AskOthers,
    ConnectionBroke,
    CountUnauthenticated,
    FrontendServes,
    InstanceLeft,
    LimitInstances,
    ListRequests,
    PoolStatus,
    ReplaceInstance,
    Requests,
    decode_from_launcher,
)
from llumsched.pool.frontend_supervisor import FrontendStatus
from llumsched.pool.instance_supervisor import InstanceSlotStatus
from llumsched.wire.control import Message, encode
from llumsched.wire.keys import Gate
from llumsched.wire.names import instance_name

logger = logging.getLogger(__name__)

COUNT_INTERVAL_S = 1.0
OTHERS_TIMEOUT_S = 5.0
# The launcher has told by then of an instance that is dead, or that it takes for dead.
BROKEN_PATIENCE_S = 15.0


def end_this_process() -> None:
    """End this process as a signal to it would."""
    os.kill(os.getpid(), signal.SIGTERM)


class LauncherClient:
    """Implements ``connections.Roster``, ``admin.InstanceSlots`` and ``admin.OtherFrontends``.

    Args:
        launcher_lost: called, on another thread, when the launcher is gone.
        has_joined: whether another than the launcher has started this frontend. Where a connection
            of one breaks, it ends rather than the instance.
    """

    def __init__(
        self,
        channel: ChannelEnd,
        frontend_id: str,
        launcher_lost: Callable[[], None] = end_this_process,
        has_joined: bool = False,
    ) -> None:
        self._has_joined = has_joined
        self._channel = channel
        self._frontend_id = frontend_id
        self._launcher_lost = launcher_lost
        self._lock = threading.Lock()
        self.is_lost = False
        self._status: PoolStatus | None = None
        self._is_told = threading.Event()
        self._left: list[InstanceLeft] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._departures: InstanceEventBridge | None = None
        self._client: RoutingEngineClient | None = None
        self._calls: dict[int, asyncio.Future[tuple[RequestStatus, ...]]] = {}
        self._call_ids = itertools.count(1)
        threading.Thread(target=self._receive, name="launcher", daemon=True).start()

    def await_status(self) -> None:
        """Wait until it is known how the pool is; the end of the launcher ends this process."""
        self._is_told.wait()

    @property
    def is_told(self) -> bool:
        """True if it is known how the pool is."""
        return self._is_told.is_set()

    def follow(self, client: RoutingEngineClient, departures: InstanceEventBridge) -> None:
        """From now on these hear what becomes of instances; call on the loop."""
        with self._lock:
            self._loop = asyncio.get_running_loop()
            self._client, self._departures = client, departures
            left, self._left = self._left, []
            status = self._status
        for message in left:
            self._tell_left(departures, message)
        if status is not None:
            self._told_status(client, status)
        client.tell_of_breaks(
            lambda index: (
                self._await_end_of(client, index)
                if self._has_joined
                else self._say(ConnectionBroke(instance_id=instance_name(index)))
            )
        )

    def _await_end_of(self, client: RoutingEngineClient, index: int) -> None:
        """Begin anew, by another process, if an instance lives on whose tokens may be missing."""

        def look() -> None:
            if client.is_up(index):
                logger.error(
                    "The connection to %s broke, which lives on: this frontend ends, to be started"
                    " again by whoever has started it",
                    instance_name(index),
                )
                self._launcher_lost()

        asyncio.get_running_loop().call_later(BROKEN_PATIENCE_S, look)

    def serves(self) -> None:
        """Tell the launcher that this frontend takes requests from now on."""
        self._say(FrontendServes())

    async def count(self, gate: Gate) -> None:
        """Tell how many strangers have knocked, until cancelled."""
        told = 0
        while True:
            if gate.num_unauthenticated != told:
                told = gate.num_unauthenticated
                self._say(CountUnauthenticated(num_unauthenticated=told))
            await asyncio.sleep(COUNT_INTERVAL_S)

    # ---- how the pool is ------------------------------------------------------------------------

    def labels(self) -> Mapping[int, int]:
        """The instances that serve, with their labels."""
        return self._status.labels if self._status is not None else {}

    @property
    def max_instances(self) -> int:
        """The launcher starts no more instances than this, whoever asks."""
        return self._status.max_instances if self._status is not None else 0

    def describe(self) -> Sequence[InstanceSlotStatus]:
        """Every berth of an instance."""
        return self._status.berths if self._status is not None else ()

    def frontends(self) -> Sequence[FrontendStatus]:
        """Every place of a frontend."""
        return self._status.frontends if self._status is not None else ()

    def unproven(self) -> Mapping[str, int]:
        """Connections that the gates of launcher and frontends have turned away."""
        return self._status.unproven if self._status is not None else {}

    async def requests(self) -> Sequence[RequestStatus]:
        """Requests of all other frontends.

        Raises:
            TimeoutError: if one of them does not answer.
        """
        call_id = next(self._call_ids)
        answer: asyncio.Future[tuple[RequestStatus, ...]]
        answer = asyncio.get_running_loop().create_future()
        self._calls[call_id] = answer
        try:
            self._say(AskOthers(call_id=call_id))
            async with asyncio.timeout(OTHERS_TIMEOUT_S):
                return await answer
        finally:
            del self._calls[call_id]

    # ---- what is wanted -------------------------------------------------------------------------

    def replace(self, instance_id: str) -> None:
        """When this instance has ended, start another."""
        self._say(ReplaceInstance(instance_id=instance_id))

    def limit(self, num_instances: int) -> None:
        """No more instances than this."""
        self._say(LimitInstances(num_instances=num_instances))

    # ---- the channel ----------------------------------------------------------------------------

    def _say(self, message: Message) -> None:
        try:
            self._channel.send(encode(message))
        except ChannelClosed:
            return  # the thread that receives hears of it as well

    def _receive(self) -> None:
        try:
            while True:
                self._take_in(decode_from_launcher(self._channel.receive()))
        except ChannelClosed:
            logger.info("The launcher is gone")
        finally:
            self.is_lost = True
            self._launcher_lost()

    def _take_in(self, message: Message) -> None:
        with self._lock:
            loop, client, departures = self._loop, self._client, self._departures
            match message:
                case PoolStatus():
                    self._status = message
                    self._is_told.set()
                case InstanceLeft() if departures is None:
                    self._left.append(message)
        if loop is None or client is None or departures is None:
            return
        match message:
            case PoolStatus():
                loop.call_soon_threadsafe(self._told_status, client, message)
            case InstanceLeft():
                self._tell_left(departures, message)
            case ListRequests():
                loop.call_soon_threadsafe(self._list_requests, client, message.call_id)
            case Requests():
                loop.call_soon_threadsafe(self._told, message)

    def _told_status(self, client: RoutingEngineClient, status: PoolStatus) -> None:
        client.labels.were_used(status.num_labels_used)
        client.roster_changed()

    def _tell_left(self, departures: InstanceEventBridge, left: InstanceLeft) -> None:
        departures.gone(left.engine_index, expected=left.expected, is_counted=left.is_counted)

    def _list_requests(self, client: RoutingEngineClient, call_id: int) -> None:
        requests = tuple(requests_of(client.routes, self._frontend_id))
        self._say(Requests(call_id=call_id, requests=requests))

    def _told(self, message: Requests) -> None:
        call = self._calls.get(message.call_id)
        if call is not None and not call.done():
            call.set_result(message.requests)
