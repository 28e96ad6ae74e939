"""Events that the source's engine tells a migration, and commands that the engine is given.

The rest of the source's events are messages of the destination, the rest of its commands messages
to it (`core.migration.messages`). Knows no rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from llumsched.core.migration.events import DeadlineExpired, LocalCommand, LocalEvent, PeerLost
from llumsched.core.migration.messages import (
    BlocksCopied,
    BlocksReserved,
    CommitAcknowledged,
    CommitRefused,
    ReservationRejected,
    ToDestination,
    ToSource,
)


class MigrationState(StrEnum):
    """Where the source stands. The last two are terminal."""

    RESERVING = "RESERVING"
    COPYING = "COPYING"
    SUSPENDING = "SUSPENDING"
    COMMITTING = "COMMITTING"
    RESOLVING = "RESOLVING"
    COMMITTED = "COMMITTED"
    ABORTED = "ABORTED"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSuspended(LocalEvent):
    """No step in flight touches the request and none will.

    `num_blocks_to_copy` counts the blocks after those that are copied, the partial tail included.
    """

    num_blocks_to_copy: int
    num_preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedAtSource(LocalEvent):
    """The source decoded the request to its end and has freed it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortedAtSource(LocalEvent):
    """The client aborted the request at the source. The engine may have dropped it already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreemptedAtSource(LocalEvent):
    """The source's engine took the request's blocks away; it will recompute the request."""


SourceEvent = ToSource | LocalEvent

EVENTS: tuple[type[SourceEvent], ...] = (
    BlocksReserved,
    ReservationRejected,
    BlocksCopied,
    RequestSuspended,
    FinishedAtSource,
    AbortedAtSource,
    PreemptedAtSource,
    CommitAcknowledged,
    CommitRefused,
    DeadlineExpired,
    PeerLost,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspendRequest(LocalCommand):
    """In `after_s`, and unless the migration has ended by then, stop scheduling the request and
    wait for its steps in flight. Answered by RequestSuspended, or by FinishedAtSource or
    PreemptedAtSource if that came first."""

    num_blocks_copied: int
    after_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRequest(LocalCommand):
    """Drop the request with no output; nothing if it is gone already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeRequest(LocalCommand):
    """Let the source schedule the request again; nothing if it is not suspended.

    After the death of a destination with the commit's fate unknown, the client may have tokens from
    it. The frontend drops, by position, the tokens that the source then repeats.
    """


SourceCommand = ToDestination | LocalCommand
