"""How many lines may be in flight: as many as fill idle room, and few beside others' requests.

Pure: what the endpoint says comes in, a number goes out. The number grows by one an instance at a
time while nobody else is there, is cut to the share beside others as soon as somebody is, and is
halved wherever requests wait.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llumsched.core.types import PriorityClass

FULL_CACHE_USAGE = 0.85
FAR_FROM_FULL = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Load of all serving instances together, as the endpoint's scheduler tells it."""

    num_instances: int
    num_others: int
    """Requests of other classes than bulk work, running or held by the scheduler."""
    num_waiting: int
    """Requests of any class that wait, at instances or with the scheduler."""
    cache_usage: float
    """Used share of the KV cache of the fullest instance, 0 to 1."""


def room_of(described: Mapping[str, Any]) -> Room:
    """The room that an answer of `GET /llumsched/instances` describes.

    Raises:
        KeyError, TypeError, ValueError: the answer is not one.
    """
    loads: Sequence[Mapping[str, Any]] = [
        instance["load"]
        for instance in described["instances"]
        if instance["state"] == "serving" and instance["load"] is not None
    ]
    num_others = sum(
        num_running
        for load in loads
        for priority, num_running in load["num_running_by_class"]
        if priority > PriorityClass.LOW
    )
    queued: Mapping[str, int] = described["queued"]
    low = PriorityClass.LOW.name.lower()
    return Room(
        num_instances=len(loads),
        num_others=num_others + sum(n for name, n in queued.items() if name != low),
        num_waiting=sum(load["num_waiting"] for load in loads) + sum(queued.values()),
        cache_usage=max(
            (1 - load["num_free_blocks"] / max(1, load["num_total_blocks"]) for load in loads),
            default=0.0,
        ),
    )


@dataclass(slots=True, kw_only=True)
class Pace:
    """Limit of lines in flight of one worker."""

    most_in_flight: int = 256
    """Never more than this."""
    beside_others: int = 1
    """Lines in flight for each instance while other requests run."""
    limit: int = 1

    def observe(self, room: Room, num_in_flight: int, *, is_late: bool = False) -> None:
        """Learn what the endpoint says.

        Args:
            room: what it says.
            num_in_flight: lines of this worker, which are part of it.
            is_late: some batch will miss its deadline at the present rate; then others that
                merely run are no reason to yield, only what waits is.
        """
        if room.num_instances == 0:
            self.limit = 0
            return
        yields = room.num_others > 0 and not is_late
        beside = self.beside_others * room.num_instances
        if room.num_waiting:
            self.limit = max(1, min(self.limit, num_in_flight) - room.num_waiting)
        elif room.cache_usage > FULL_CACHE_USAGE:
            self.limit = max(1, num_in_flight // 2)
        elif yields:
            self.limit = beside
        elif room.cache_usage < FAR_FROM_FULL and num_in_flight >= self.limit - room.num_instances:
            self.limit += room.num_instances
        if yields:
            self.limit = min(self.limit, beside)
        self.limit = min(self.limit, self.most_in_flight)

    def answered(self, *, is_overloaded: bool) -> None:
        """Learn from an answer where the endpoint says nothing of its room."""
        if is_overloaded:
            self.limit = max(1, self.limit // 2)
        elif self.limit < self.most_in_flight:
            self.limit += 1
