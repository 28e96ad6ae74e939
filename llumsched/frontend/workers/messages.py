"""Messages between launcher and frontends, by a pair of sockets that each is born with.

A frontend that has joined has a connection instead (``remote_channel``).

As with the scheduler's (``llumsched.wire.control``), decoding checks types and runs no code.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from llumsched.frontend.routing.status import RequestStatus
from llumsched.pool.frontend_supervisor import FrontendStatus
from llumsched.pool.instance_supervisor import InstanceSlotStatus
from llumsched.wire.control import Message

# ---- launcher -> frontend -----------------------------------------------------------------------


class PoolStatus(Message, frozen=True, kw_only=True):
    """How everything that the launcher has started is; told whenever it changes.

    ``max_instances`` is the most that will ever be started. ``labels`` are those that the serving
    instances have in vLLM's metrics, by engine index; the first ``num_labels_used`` have ever been
    in use. ``unproven`` counts what the gates of frontends and launcher have turned away.
    """

    max_instances: int
    berths: tuple[InstanceSlotStatus, ...]
    frontends: tuple[FrontendStatus, ...]
    labels: Mapping[int, int]
    num_labels_used: int
    unproven: Mapping[str, int]


class InstanceLeft(Message, frozen=True, kw_only=True):
    """An instance is gone; the scheduler knows. Of all frontends one counts it."""

    engine_index: int
    expected: bool
    is_counted: bool


class Admitted(Message, frozen=True, kw_only=True):
    """Answers ``JoinPool``, before anything else: the place of the frontend."""

    client_index: int


class ListRequests(Message, frozen=True, kw_only=True):
    """Asks a frontend for its requests, for another."""

    call_id: int


# ---- frontend -> launcher -----------------------------------------------------------------------


class JoinPool(Message, frozen=True, kw_only=True):
    """A frontend that the launcher has not started wants to join, before anything else.

    ``pid`` is its process, on the machine ``node``; ``input_address`` and ``output_address`` are
    where instances connect, for requests and for outputs.
    """

    pid: int
    node: str
    input_address: str
    output_address: str


class FrontendServes(Message, frozen=True, kw_only=True):
    """The frontend takes requests from now on."""


class ConnectionBroke(Message, frozen=True, kw_only=True):
    """Outputs that an instance has sent to this frontend may be lost."""

    instance_id: str


class ReplaceInstance(Message, frozen=True, kw_only=True):
    """An operator wants another instance in the place of this one, when it has ended."""

    instance_id: str


class LimitInstances(Message, frozen=True, kw_only=True):
    """An operator wants no more instances than this."""

    num_instances: int


class CountUnauthenticated(Message, frozen=True, kw_only=True):
    """How many connections this frontend's gate has turned away."""

    num_unauthenticated: int


class AskOthers(Message, frozen=True, kw_only=True):
    """Asks the launcher for the requests of all other frontends."""

    call_id: int


# ---- both ways ----------------------------------------------------------------------------------


class Requests(Message, frozen=True, kw_only=True):
    """Answers ``ListRequests`` and ``AskOthers``."""

    call_id: int
    requests: tuple[RequestStatus, ...]


LauncherMessage = Admitted | PoolStatus | InstanceLeft | ListRequests | Requests
FrontendMessage = (
    FrontendServes
    | ConnectionBroke
    | ReplaceInstance
    | LimitInstances
    | CountUnauthenticated
    | AskOthers
    | Requests
)

decode_from_launcher = msgspec.msgpack.Decoder(LauncherMessage).decode
decode_from_frontend = msgspec.msgpack.Decoder(FrontendMessage).decode
