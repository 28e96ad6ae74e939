"""Events that the hosts of both ends tell: the wait is over in vain, or the other end is lost.

Events and commands of one end alone are in its own folder, messages in `messages`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalEvent:
    """A fact of this end, told once and in order."""

    migration_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCommand:
    """To be carried out by the host of this end, on its engine."""

    migration_id: str
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlineExpired(LocalEvent):
    """The wait of `state` (and `stage`) has lasted for `timeout_s(record)`."""

    state: StrEnum
    stage: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLost(LocalEvent):
    """The other end cannot be reached, or, if `is_dead`, its process is known to be gone.

    Silence is never death: set `is_dead` only on the word of whoever owns the process. An instance
    that restarts has a new id, so what is dead stays dead.
    """

    reason: str
    is_dead: bool = False
