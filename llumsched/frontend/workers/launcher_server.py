"""The launcher's side of the channels to its frontends.

It passes on to all what they must know of the pool, to the supervisor what they ask of it, and asks
one what another wants to know. A frontend that leaves answers no more: whoever waits for it is told
what the others have said.

This module starts no processes (``children``), and serves nothing itself.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

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
    decode_from_frontend,
)
from llumsched.wire.control import Message, encode
from llumsched.wire.names import frontend_id

logger = logging.getLogger(__name__)


class InstanceControls(Protocol):
    """Controls over the instances; may be called from any thread."""

    def replace(self, instance_id: str) -> None: ...

    def limit(self, num_instances: int) -> None: ...

    def connection_broke(self, instance_id: str) -> None: ...


@dataclass(slots=True)
class _Member:
    channel: ChannelEnd
    serves: bool = False
    num_unauthenticated: int = 0


@dataclass(slots=True)
class _Round:
    """A question of one frontend to all others."""

    asker: int
    call_id: int
    unanswered: set[int]
    requests: list[RequestStatus] = field(default_factory=list)


class LauncherServer:
    """Frontends by their place; a thread receives from each."""

    def __init__(self) -> None:
        self._supervisor: InstanceControls | None = None
        self._lock = threading.RLock()
        self._members: dict[int, _Member] = {}
        self._rounds: dict[int, _Round] = {}
        self._round_ids = itertools.count(1)
        self._last_status: PoolStatus | None = None
        self._changed: Callable[[], None] = lambda: None

    # ---- what the launcher does ---------------------------------------------------------------

    def supervise_with(self, supervisor: InstanceControls) -> None:
        """From now on what frontends want of instances is done."""
        self._supervisor = supervisor

    def tell_of_changes(self, changed: Callable[[], None]) -> None:
        """Have this called, on any thread, when a frontend has begun to serve, has turned away
        more strangers, or is heard no more."""
        self._changed = changed

    def join(self, index: int, channel: ChannelEnd) -> None:
        """A frontend was started in this place, and is told how the pool is."""
        with self._lock:
            self._members[index] = _Member(channel)
            if self._last_status is not None:
                self._send(index, self._last_status)
        threading.Thread(
            target=self._receive, args=(index, channel), name=f"hear-{index}", daemon=True
        ).start()

    def leave(self, index: int) -> None:
        """The frontend in this place is gone."""
        with self._lock:
            member = self._members.pop(index, None)
            if member is None:
                return
            member.channel.close()
            for round_id in list(self._rounds):
                self._answered(round_id, index, ())

    def has(self, index: int) -> bool:
        """True if there is a frontend in this place that hears."""
        return index in self._members

    def serves(self, index: int) -> bool:
        """True if the frontend in this place has begun to take requests."""
        member = self._members.get(index)
        return member is not None and member.serves

    def unproven(self) -> Mapping[str, int]:
        """Connections that the gates of the frontends have turned away, by name."""
        return {frontend_id(i): m.num_unauthenticated for i, m in list(self._members.items())}

    def tell(self, status: PoolStatus) -> None:
        """Say how the pool is, if that has changed."""
        with self._lock:
            if status != self._last_status:
                self._last_status = status
                for index in list(self._members):
                    self._send(index, status)

    def instance_lost(
        self, instance: int, *, expected: bool = False, is_counted: bool = True
    ) -> None:
        """An instance is gone; as a frontend's client is told."""
        with self._lock:
            serving = [index for index, member in self._members.items() if member.serves]
            counting = min(serving, default=None) if is_counted else None
            for index in list(self._members):
                left = InstanceLeft(
                    engine_index=instance, expected=expected, is_counted=index == counting
                )
                self._send(index, left)

    # ---- what frontends want ------------------------------------------------------------------

    def _receive(self, index: int, channel: ChannelEnd) -> None:
        try:
            while True:
                self._take_in(index, channel, decode_from_frontend(channel.receive()))
        except ChannelClosed:
            self._changed()  # its process is looked after elsewhere

    def _take_in(self, index: int, channel: ChannelEnd, message: Message) -> None:
        with self._lock:
            member = self._members.get(index)
            if member is None or member.channel is not channel:
                return  # another is in its place
            match message:
                case FrontendServes():
                    member.serves = True
                    self._changed()
                case CountUnauthenticated():
                    member.num_unauthenticated = message.num_unauthenticated
                    self._changed()
                case ConnectionBroke() if self._supervisor is not None:
                    self._supervisor.connection_broke(message.instance_id)
                case ReplaceInstance() if self._supervisor is not None:
                    self._supervisor.replace(message.instance_id)
                case LimitInstances() if self._supervisor is not None:
                    self._supervisor.limit(message.num_instances)
                case AskOthers():
                    self._ask_others(index, message.call_id)
                case Requests():
                    self._answered(message.call_id, index, message.requests)

    def _ask_others(self, asker: int, call_id: int) -> None:
        # One that boots has no request, and nobody there answers.
        others = {i for i, member in self._members.items() if i != asker and member.serves}
        round_id = next(self._round_ids)
        self._rounds[round_id] = _Round(asker, call_id, set(others))
        for index in others:
            self._send(index, ListRequests(call_id=round_id))
        self._answered(round_id, asker, ())

    def _answered(self, round_id: int, index: int, requests: tuple[RequestStatus, ...]) -> None:
        asked = self._rounds.get(round_id)
        if asked is None:
            return
        asked.requests += requests
        asked.unanswered.discard(index)
        if not asked.unanswered:
            del self._rounds[round_id]
            self._send(asked.asker, Requests(call_id=asked.call_id, requests=tuple(asked.requests)))

    # ---- sending ------------------------------------------------------------------------------

    def _send(self, index: int, message: Message) -> None:
        member = self._members.get(index)
        if member is None:
            return
        try:
            member.channel.send(encode(message))
        except ChannelClosed as error:
            logger.warning("%s does not hear: %s", frontend_id(index), error)
            self.leave(index)
