"""Messages between frontend, scheduler and instances.

Every message is a tagged ``msgspec`` struct in MessagePack: decoding checks the types and runs
no code of the sender's. What the migrators of two instances say to each other is apart from it
(``migration.messages``), on sockets of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from llumsched.core.actions import Rejection
from llumsched.core.events import Event, KvBlocksRemoved, KvBlocksStored, KvCacheCleared
from llumsched.core.load import InstanceLoad, InstanceSpec
from llumsched.core.types import Allowance, SchedulingRequest


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all messages; the tag on the wire is the class name."""


# ---- control: instance <-> global scheduler ---------------------------------------------------


class RegisterInstance(Message, frozen=True, kw_only=True):
    """An instance is ready. ``peer_endpoint`` is where other instances reach its migrator;
    ``fingerprint`` must be equal on two instances for KV to move between them. ``request_ids`` are
    those it holds already: a scheduler that restarts learns them from here. ``cannot_migrate`` is
    why none of its requests can move; empty if they can."""

    spec: InstanceSpec
    engine_index: int
    peer_endpoint: str
    fingerprint: str
    cannot_migrate: str = ""
    launch_id: str | None = None
    request_ids: tuple[str, ...] = ()


class InstanceLeaves(Message, frozen=True, kw_only=True):
    """An instance was told to end, by whoever runs its machine: it wants to be drained."""

    instance_id: str


class ReportLoad(Message, frozen=True, kw_only=True):
    """``num_unauthenticated`` is ``Gate.num_unauthenticated`` of the instance."""

    load: InstanceLoad
    num_unauthenticated: int = 0


class PrefixBlockChange(msgspec.Struct, frozen=True, kw_only=True):
    """``block_hashes`` are empty for ``cleared``."""

    kind: Literal["stored", "removed", "cleared"]
    block_hashes: tuple[int, ...] = ()


class ReportPrefixBlocks(Message, frozen=True, kw_only=True):
    """Gains and losses of an instance's prefix cache since the last report, in order."""

    instance_id: str
    changes: list[PrefixBlockChange]

    @classmethod
    def of(cls, instance_id: str, events: Iterable[Event]) -> ReportPrefixBlocks:
        """The message for the core's events of one instance."""
        changes = []
        for event in events:
            match event:
                case KvBlocksStored():
                    change = PrefixBlockChange(kind="stored", block_hashes=event.block_hashes)
                case KvBlocksRemoved():
                    change = PrefixBlockChange(kind="removed", block_hashes=event.block_hashes)
                case KvCacheCleared():
                    change = PrefixBlockChange(kind="cleared")
                case _:
                    raise TypeError(f"{type(event).__name__} does not tell of prefix blocks")
            changes.append(change)
        return cls(instance_id=instance_id, changes=changes)

    def events(self) -> Iterator[Event]:
        """The core's events for it."""
        for change in self.changes:
            match change.kind:
                case "stored":
                    yield KvBlocksStored(
                        instance_id=self.instance_id, block_hashes=change.block_hashes
                    )
                case "removed":
                    yield KvBlocksRemoved(
                        instance_id=self.instance_id, block_hashes=change.block_hashes
                    )
                case "cleared":
                    yield KvCacheCleared(instance_id=self.instance_id)


class OrderMigration(Message, frozen=True, kw_only=True):
    """The scheduler's order to a source. Without ``request_id`` the source picks the request.

    Of one that ``has_ended`` what is cached moves, for the next turn of its session.
    """

    migration_id: str
    destination: str
    destination_endpoint: str
    request_id: str | None
    reason: str
    settle_s: float = 0.0
    has_ended: bool = False


class Welcomed(Message, frozen=True, kw_only=True):
    """The scheduler knows the sender of a registration now.

    ``scheduler_id`` is another after it was started again.
    """

    scheduler_id: str


class Unknown(Message, frozen=True, kw_only=True):
    """The scheduler has not heard of the sender: it restarted, or forgot it for its silence."""


class ReportMigration(Message, frozen=True, kw_only=True):
    """How a migration ended, from its source. ``outcome`` is a ``MigrationOutcome`` value;
    ``cause`` is why it did not move the request, as one of few words: an ``AbortReason`` or a
    ``Refusal``; ``phase`` is how far it had come: ``choosing`` a request, ``starting``, or a
    ``MigrationState`` in lower case; ``has_ended`` is the order's."""

    migration_id: str
    request_id: str | None
    source: str
    destination: str
    outcome: str
    reason: str
    cause: str = ""
    phase: str = "starting"
    statistics: MigrationStatistics | None = None
    has_ended: bool = False


class StageStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of a migration: it began ``began_s`` after the order had come to the source, and
    the destination had the blocks ``took_s`` later."""

    num_blocks: int
    began_s: float
    took_s: float


class MigrationStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Measured at the source. Times in seconds; ``suspended_s`` is from the end of the last step
    here to the next token at the destination, so it is the client's pause. If that token takes
    longer than a second, it is to the destination's acknowledgement, which does not wait on."""

    num_stages: int
    num_blocks: int
    num_cached_blocks: int
    num_bytes: int
    num_tokens: int
    num_output_tokens: int
    total_s: float
    suspended_s: float
    step_time_s: float
    transport: str
    stages: tuple[StageStatistics, ...] = ()


# ---- control: frontend <-> global scheduler ---------------------------------------------------


class RegisterFrontend(Message, frozen=True, kw_only=True):
    """A frontend is there; told again and again, since a scheduler that restarts has forgotten it.

    ``supervises``: it starts and ends instances, of which ``num_replacing`` come in the place of
    others without having been ordered. ``draining`` are those that an operator drains.
    """

    frontend_id: str
    supervises: bool = False
    num_replacing: int = 0
    draining: tuple[str, ...] = ()


class PlaceRequest(Message, frozen=True, kw_only=True):
    """Asks for an instance; told again when no answer comes, and gets the same answer again.

    ``lost`` is the instance that died with the request, whose stream has begun if ``has_begun``.
    """

    request: SchedulingRequest
    lost: str | None = None
    has_begun: bool = False


class Placed(Message, frozen=True, kw_only=True):
    """Answer to ``PlaceRequest``: an instance, or the reason why there is none."""

    request_id: str
    instance_id: str | None
    reason: str
    engine_index: int | None = None
    predicted_output_tokens: int | None = None
    retry_after_s: float | None = None
    rejection: Rejection = Rejection.OVERLOADED
    allowance: Allowance | None = None


class SentElsewhere(Message, frozen=True, kw_only=True):
    """A frontend has sent a request to an instance that it chose itself, since the scheduler was
    silent or the engine that it named is paused."""

    request: SchedulingRequest
    instance_id: str


class RequestEnded(Message, frozen=True, kw_only=True):
    """The client of a request is gone, or its stream is complete, with so many output tokens."""

    request_id: str
    aborted: bool
    num_output_tokens: int | None = None


class MigrateRequest(Message, frozen=True, kw_only=True):
    """An operator's wish to move a request, to any instance or to the one named.

    With a ``session_id`` it is what that session has: a request, or the KV of its last one.
    """

    call_id: int
    request_id: str
    destination: str | None
    session_id: str | None = None


class MigrateAnswer(Message, frozen=True, kw_only=True):
    """``refused`` is the reason why nothing was started; else ``report`` says how it ended."""

    call_id: int
    refused: str | None = None
    report: ReportMigration | None = None


class DrainInstance(Message, frozen=True, kw_only=True):
    """An operator's wish: no new work for the instance, its requests elsewhere, then its end, after
    ``deadline_s`` at the latest."""

    call_id: int
    instance_id: str
    deadline_s: float | None = None


class ScalePool(Message, frozen=True, kw_only=True):
    """An operator's wish to have this many instances."""

    call_id: int
    num_instances: int


class Accepted(Message, frozen=True, kw_only=True):
    """The scheduler acts on an operator's wish, or says why not."""

    call_id: int
    refused: str | None = None


class OrderLaunch(Message, frozen=True, kw_only=True):
    """The scheduler's order to whoever supervises the instances: start one more."""

    launch_id: str
    reason: str


class LaunchRefused(Message, frozen=True, kw_only=True):
    """An ordered instance will not come."""

    launch_id: str
    reason: str


class OrderReplacement(Message, frozen=True, kw_only=True):
    """The scheduler's order to start another instance in the place of this one when it has ended:
    it leaves by itself, and nobody wants fewer."""

    instance_id: str


class OrderTermination(Message, frozen=True, kw_only=True):
    """The scheduler's order to end an instance; told again until it is lost."""

    instance_id: str
    reason: str


class DescribeCluster(Message, frozen=True, kw_only=True):
    call_id: int


class TraceRequest(Message, frozen=True, kw_only=True):
    """Asks what became of a request; ``request_id`` may be what the client knows."""

    call_id: int
    request_id: str


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """An instance as the scheduler knew it when it chose one. ``score`` is what the policy compared
    it by; ``None`` if it did not compare by numbers, or the instance had none."""

    instance_id: str
    num_free_blocks: int
    num_total_blocks: int
    num_running: int
    num_waiting: int
    score: float | None = None


class TraceStep(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a request. ``at_s`` are seconds since the epoch; ``candidates`` are told of a
    dispatch, the chosen one first, then the freest; ``scored_by`` is what their scores are.
    ``statistics`` are told of a migration that was committed."""

    at_s: float
    kind: str
    text: str
    instance_id: str | None
    migration_id: str | None
    candidates: list[Candidate]
    scored_by: str = ""
    statistics: MigrationStatistics | None = None


class RequestTraced(Message, frozen=True, kw_only=True):
    """The steps of a request, by the ids of its sequences; none if it is not remembered."""

    call_id: int
    requests: dict[str, list[TraceStep]]


class InstanceGone(Message, frozen=True, kw_only=True):
    """The process of an instance is known to be dead; sent to every instance."""

    instance_id: str


class InstanceDescription(msgspec.Struct, frozen=True, kw_only=True):
    """``cannot_migrate`` is why no request of the instance can move; empty if they can."""

    instance_id: str
    state: str
    role: str
    freeness: float | None
    report_age_s: float | None
    load: InstanceLoad | None
    cannot_migrate: str = ""


class ClusterDescription(Message, frozen=True, kw_only=True):
    """``migrations`` counts ended migrations by outcome, ``migration_causes`` those that moved
    nothing by their cause, ``policy_failures`` the decisions in which a policy raised or answered
    nonsense, ``queued`` the requests held by the scheduler, by the name of their priority class,
    ``unproven`` the connections that did not hold the pool's keys, by process.
    ``num_output_tokens`` are those of the requests that finished. ``scheduler_age_s`` is the time
    since this scheduler was started."""

    call_id: int
    policy: str
    scheduler_age_s: float = 0.0
    instances: list[InstanceDescription]
    migrations: dict[str, int]
    migration_causes: dict[str, int] = {}
    queued: dict[str, int] = {}
    policy_failures: dict[str, int] = {}
    num_finished_requests: int = 0
    num_output_tokens: int = 0
    unproven: dict[str, int] = {}


ControlMessage = (
    RegisterInstance
    | ReportLoad
    | ReportPrefixBlocks
    | Welcomed
    | Unknown
    | OrderMigration
    | ReportMigration
    | InstanceGone
    | RegisterFrontend
    | PlaceRequest
    | Placed
    | SentElsewhere
    | RequestEnded
    | InstanceLeaves
    | DrainInstance
    | ScalePool
    | Accepted
    | OrderLaunch
    | LaunchRefused
    | OrderReplacement
    | OrderTermination
    | MigrateRequest
    | MigrateAnswer
    | DescribeCluster
    | ClusterDescription
    | TraceRequest
    | RequestTraced
)

encode = msgspec.msgpack.Encoder().encode
decode_control = msgspec.msgpack.Decoder(ControlMessage).decode
