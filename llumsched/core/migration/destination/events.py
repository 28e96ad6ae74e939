"""Events that the destination's engine tells a reservation, and commands that the engine is given.

The rest of the destination's events are messages of the source, the rest of its commands messages
to it (`core.migration.messages`). Knows no rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from llumsched.core.migration.events import DeadlineExpired, LocalCommand, LocalEvent, PeerLost
from llumsched.core.migration.messages import (
    AbortAtDestination,
    CloseMigration,
    CommitRequest,
    CopyBlocks,
    QueryCommit,
    ReleaseReservation,
    ReserveBlocks,
    ToDestination,
    ToSource,
)


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
class BlocksAllocated(LocalEvent):
    """The engine holds blocks for the request; the first `num_cached_blocks` have content."""

    num_cached_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationFailed(LocalEvent):
    """The engine cannot hold the request, or cannot hold more of it."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksWritten(LocalEvent):
    """The stage is in the KV cache; the first `num_blocks_total` blocks have content."""

    stage: int
    num_blocks_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestAdmitted(LocalEvent):
    """The engine schedules the request from now on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionFailed(LocalEvent):
    """The engine could not take the request over and has nothing of it but the blocks."""

    reason: str


DestinationEvent = ToDestination | LocalEvent

EVENTS: tuple[type[DestinationEvent], ...] = (
    ReserveBlocks,
    CopyBlocks,
    CommitRequest,
    QueryCommit,
    ReleaseReservation,
    AbortAtDestination,
    CloseMigration,
    BlocksAllocated,
    AllocationFailed,
    BlocksWritten,
    RequestAdmitted,
    AdmissionFailed,
    DeadlineExpired,
    PeerLost,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocateBlocks(LocalCommand):
    """Hold blocks for the request. Answered by BlocksAllocated or AllocationFailed; the latter also
    while the engine still has a request of this id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiveBlocks(LocalCommand):
    """Grow the reservation to `first_block + num_blocks` blocks and write the stage into it.

    Answered by BlocksWritten or AllocationFailed.
    """

    stage: int
    first_block: int
    num_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmitRequest(LocalCommand):
    """Take the request over, all or nothing. Answered by RequestAdmitted or AdmissionFailed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeBlocks(LocalCommand):
    """Give back the blocks that were allocated for this migration, if they were, and not those of
    another of the same request; after any write to them that is under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortRequest(LocalCommand):
    """Treat as a client's abort that has come here: the request may be moving on already."""


DestinationCommand = ToSource | LocalCommand
