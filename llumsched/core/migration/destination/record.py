"""Record of one migration at the destination, and how long it waits.

Invariant: the first `num_blocks_written` blocks of a reservation equal the source's. Knows neither
the rules (`rules`) nor the messages' way.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from llumsched.core.migration.destination.events import ReservationState


class ReleaseReason(StrEnum):
    """Why a migration holds nothing here."""

    NO_ROOM = "no_room"
    OUT_OF_STEP = "out_of_step"
    RELEASED_BY_SOURCE = "released_by_source"
    SOURCE_LOST = "source_lost"
    EXPIRED = "expired"
    NOT_COMMITTED_WHEN_ASKED = "not_committed_when_asked"
    COMMIT_INCOMPLETE = "commit_incomplete"
    COMMIT_UNKNOWN = "commit_unknown"
    ADMISSION_FAILED = "admission_failed"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservationOptions:
    """How long the destination waits.

    A reservation that hears nothing for `reservation_timeout_s` is released. A commit is
    acknowledged again every `acknowledge_interval_s` until the source has closed the migration. A
    tombstone is kept for `tombstone_s`, which must exceed the time for which the link can delay a
    message.
    """

    reservation_timeout_s: float = 60.0
    acknowledge_interval_s: float = 1.0
    tombstone_s: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Record of one migration at its destination.

    The first `num_blocks_written` blocks have content. `stage`, `first_block` and
    `num_stage_blocks` describe the latest stage announced; `num_commit_blocks` is the size of the
    request that the source asked to commit.
    """

    migration_id: str
    options: ReservationOptions
    request_id: str = ""
    source: str = ""
    state: ReservationState = ReservationState.ABSENT
    stage: int = 0
    first_block: int = 0
    num_stage_blocks: int = 0
    num_blocks_written: int = 0
    num_commit_blocks: int = 0
    source_is_dead: bool = False
    release_reason: ReleaseReason | None = None
    release_detail: str = ""

    @property
    def reason(self) -> str:
        """Why the migration holds nothing here, for the source."""
        return ": ".join(part for part in (self.release_reason, self.release_detail) if part)

    @property
    def takes_blocks(self) -> bool:
        """True if blocks of the latest stage may be written."""
        return self.state in (ReservationState.RECEIVING, ReservationState.COMMIT_PENDING)

    @property
    def may_move_on(self) -> bool:
        """True if the request may be migrated again from here.

        While the source has not learned of the commit it would resume the request if this instance
        died, wherever the request was by then.
        """
        return self.state in (ReservationState.RELEASED, ReservationState.ABSENT)
