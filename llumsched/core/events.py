"""Everything that can happen to the global scheduler, as frozen values in the past tense.

Invariant: an event carries data only; the time at which it is handled is handed in beside it.
This module does not know what any event leads to (`scheduler`).
"""

from dataclasses import dataclass
from enum import StrEnum

from llumsched.core.load import InstanceLoad, InstanceSpec
from llumsched.core.types import SchedulingRequest


class MigrationOutcome(StrEnum):
    """How a migration ended, as its source reports it."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    REFUSED = "refused"
    NOTHING_TO_MOVE = "nothing_to_move"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceJoined:
    """An instance is up and may be dispatched to.

    `launch_id` names the `LaunchInstance` it answers, if any. `request_ids` are requests it already
    holds: a scheduler that restarts learns them again from here.
    """

    spec: InstanceSpec
    launch_id: str | None = None
    request_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceLost:
    """An instance is gone: it died, or it left after `TerminateInstance`."""

    instance_id: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchFailed:
    """A `LaunchInstance` will not lead to an instance."""

    launch_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplacementsCounted:
    """So many instances boot, or are about to, in the place of others that ended; unasked.

    One whose boot has failed counts no more, though it is tried again.
    """

    num_instances: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReported:
    """An instance pushed a load report."""

    load: InstanceLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestArrived:
    """A client's request reached a frontend. A second arrival of a live id changes nothing.

    `has_begun`: its stream has, at an instance that died when no scheduler knew of it. Such a
    request is not turned away, only held.
    """

    request: SchedulingRequest
    has_begun: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFinished:
    """A request ended by itself. May be told twice (by the frontend and in a load report)."""

    request_id: str
    num_output_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestAborted:
    """A client went away, or a frontend stopped its request."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSentElsewhere:
    """A frontend chose this instance by itself: no scheduler answered, or an engine was paused."""

    request: SchedulingRequest
    instance_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationFinished:
    """A `StartMigration` ended. `request_id` is the request that was to move, if one was chosen."""

    migration_id: str
    request_id: str | None
    source: str
    destination: str
    outcome: MigrationOutcome
    reason: str = ""
    pause_s: float | None = None
    """For how long the client got no token, where the source measured it: the outcome beside
    `StartMigration.expected_cost_s`."""
    num_bytes: int = 0
    """Bytes of KV that were copied, in `total_s` from the order on."""
    total_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationRequested:
    """An operator wants a request moved; without a destination the scheduler chooses one.

    With a `session_id` it is the request that runs, or else the KV of the one that ran last.
    """

    request_id: str
    destination: str | None = None
    session_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainRequested:
    """An instance is to take no new work, be emptied, and leave."""

    instance_id: str
    deadline_s: float | None = None
    """Seconds from now until it leaves with whatever it still runs; None: the configured limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRequested:
    """An operator wants this many instances."""

    num_instances: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KvBlocksStored:
    """An engine cached these prefix blocks, named in the order of the prompt."""

    instance_id: str
    block_hashes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvBlocksRemoved:
    """An engine evicted these prefix blocks."""

    instance_id: str
    block_hashes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCacheCleared:
    """An engine dropped its whole prefix cache."""

    instance_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    """The deadline that `GlobalScheduler.next_deadline` named has come (or just: time passed)."""


Event = (
    InstanceJoined
    | InstanceLost
    | LaunchFailed
    | ReplacementsCounted
    | LoadReported
    | RequestArrived
    | RequestFinished
    | RequestAborted
    | RequestSentElsewhere
    | MigrationFinished
    | MigrationRequested
    | DrainRequested
    | ScaleRequested
    | KvBlocksStored
    | KvBlocksRemoved
    | KvCacheCleared
    | Ticked
)
