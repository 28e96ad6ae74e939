"""States of a batch, by OpenAI's names, and what leads from one to the next.

Lines are checked as a file is uploaded and outcomes are read from their table, so that OpenAI's
`validating` and `finalizing` take no time here and are no states.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class Status(StrEnum):
    """State of a batch."""

    IN_PROGRESS = "in_progress"
    CANCELLING = "cancelling"
    """Nothing more is sent; lines in flight are being ended."""
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    FAILED = "failed"
    """Refused as it was made."""


class Event(StrEnum):
    """Events in the life of a batch."""

    CANCEL = "cancel"
    DEADLINE = "deadline"
    """The completion window of the batch is over."""
    ALL_ENDED = "all_ended"
    """Every line has its outcome."""
    NONE_IN_FLIGHT = "none_in_flight"


NEXT: Mapping[tuple[Status, Event], Status] = MappingProxyType(
    {
        (Status.IN_PROGRESS, Event.CANCEL): Status.CANCELLING,
        (Status.IN_PROGRESS, Event.DEADLINE): Status.EXPIRED,
        (Status.IN_PROGRESS, Event.ALL_ENDED): Status.COMPLETED,
        (Status.CANCELLING, Event.ALL_ENDED): Status.CANCELLED,
        (Status.CANCELLING, Event.NONE_IN_FLIGHT): Status.CANCELLED,
    }
)
"""Every transition; any other event changes nothing."""

OPEN = (Status.IN_PROGRESS, Status.CANCELLING)
"""States from which there is a way on."""


def after(status: Status, event: Event) -> Status:
    """The state that an event leads to."""
    return NEXT.get((status, event), status)
