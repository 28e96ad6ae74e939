"""Events that a reservation takes in at the destination, and commands that it gives.

Events named after a message (…Requested, …Announced, …Queried, …Closed) come from the source and
may be lost, doubled or late. The others report what the destination's own engine or timer did, once
and in order. Knows neither the rules (core/migration_destination.py) nor how a message travels.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ReservationState(StrEnum):
    """Where the destination stands.

    ABSENT is also what every migration is that it has never heard of. In COMMIT_PENDING it is asked
    to take the request over, and waits for the last blocks. ADMITTING ends by itself. RELEASED is a
    tombstone: the migration holds nothing here and anything late is refused.
    """

    ABSENT = "ABSENT"
    ALLOCATING = "ALLOCATING"
    RESERVED = "RESERVED"
    RECEIVING = "RECEIVING"
    COMMIT_PENDING = "COMMIT_PENDING"
    ADMITTING = "ADMITTING"
    COMMITTED = "COMMITTED"
    RELEASED = "RELEASED"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservationEvent:
    migration_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservationRequested(ReservationEvent):
    """The source's ReserveBlocks has come."""

    request_id: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageAnnounced(ReservationEvent):
    """The source's CopyBlocks has come, with its data or ahead of it.

    A stage that travels in pieces is announced once, by its first.
    """

    stage: int
    first_block: int
    num_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRequested(ReservationEvent):
    """The source's CommitRequest has come: it has suspended a request of `num_blocks` blocks."""

    num_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitQueried(ReservationEvent):
    """The source's QueryCommit has come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRequested(ReservationEvent):
    """The source's ReleaseBlocks(DESTINATION) has come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortRequested(ReservationEvent):
    """The source's AbortAtDestination has come: it knows of the commit, and the client is gone."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationClosed(ReservationEvent):
    """The source's CloseMigration has come: it knows of the commit and will not ask again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksAllocated(ReservationEvent):
    """The engine holds blocks for the request; the first `num_cached_blocks` have content."""

    num_cached_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationFailed(ReservationEvent):
    """The engine cannot hold the request, or cannot hold more of it."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksWritten(ReservationEvent):
    """The stage is in the KV cache; the first `num_blocks_total` blocks have content."""

    stage: int
    num_blocks_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestAdmitted(ReservationEvent):
    """The engine schedules the request from now on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionFailed(ReservationEvent):
    """The engine could not take the request over and has nothing of it but the blocks."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservationExpired(ReservationEvent):
    """The wait of `state` (and `stage`) has lasted for `timeout_s(reservation, options)`."""

    state: ReservationState
    stage: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLost(ReservationEvent):
    """The source cannot be reached, or, if `is_dead`, its process is known to be gone."""

    reason: str
    is_dead: bool = False


EVENTS: tuple[type[ReservationEvent], ...] = (
    ReservationRequested,
    StageAnnounced,
    CommitRequested,
    CommitQueried,
    ReleaseRequested,
    AbortRequested,
    MigrationClosed,
    BlocksAllocated,
    AllocationFailed,
    BlocksWritten,
    RequestAdmitted,
    AdmissionFailed,
    ReservationExpired,
    SourceLost,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservationCommand:
    migration_id: str
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocateBlocks(ReservationCommand):
    """Hold blocks for the request. Answered by BlocksAllocated or AllocationFailed; the latter also
    while the engine still has a request of this id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiveBlocks(ReservationCommand):
    """Grow the reservation to `first_block + num_blocks` blocks and write the stage into it.

    Answered by BlocksWritten or AllocationFailed.
    """

    stage: int
    first_block: int
    num_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmitRequest(ReservationCommand):
    """Take the request over, all or nothing. Answered by RequestAdmitted or AdmissionFailed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeBlocks(ReservationCommand):
    """Give back the blocks that were allocated for this migration, if they were, and not those of
    another of the same request; after any write to them that is under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortRequest(ReservationCommand):
    """Treat as a client's abort that has come here: the request may be moving on already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmReservation(ReservationCommand):
    """Tell the source: BlocksReserved."""

    num_cached_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectReservation(ReservationCommand):
    """Tell the source: ReservationRejected."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmCopy(ReservationCommand):
    """Tell the source: BlocksCopied."""

    stage: int
    num_blocks_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AcknowledgeCommit(ReservationCommand):
    """Tell the source: CommitAcknowledged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefuseCommit(ReservationCommand):
    """Tell the source: CommitRefused."""

    reason: str
