"""Virtual time: whole picoseconds, and the heap of what is to happen.

Entries are `(time, priority, order, item)`. At one instant a lower priority goes first; within a
priority `order` decides, which for all but engine steps is the order of pushing.

    one instant:  MESSAGE (what was sent, timers)  ->  STEP (ends of engine steps, by instance)

Time is an integer so that a sum of many step durations is one exact number: k steps at once and k
steps one after another end at the same instant, and equal instants are equal. Invariant: nothing is
pushed into the past; whatever a STEP causes elsewhere happens at a later instant, so the order of
the steps of one instant cannot matter.

This module does not know what an item is.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any

PS_PER_S = 10**12
NEVER = 1 << 100

MESSAGE = 0
STEP = 1

Entry = tuple[int, int, int, Any]


def to_ps(seconds: float) -> int:
    """Seconds as whole picoseconds, the nearest."""
    return round(seconds * PS_PER_S)


def to_s(time_ps: int) -> float:
    """Picoseconds as seconds."""
    return time_ps / PS_PER_S


class Kernel:
    """The heap and the clock. Whoever runs the loop may read `heap` directly."""

    __slots__ = ("heap", "next_number", "now", "skipped")

    def __init__(self) -> None:
        self.heap: list[Entry] = []
        self.now = 0
        self.skipped = 0
        """Idle time that was cut out so far (see `cluster.idle`)."""
        self.next_number: Callable[[], int] = count(1).__next__
        """Gives a number that no other caller has been given."""

    def send(self, time: int, item: Any) -> None:
        """A message, or a timer, that comes at `time`; those of one instant in this order."""
        heapq.heappush(self.heap, (time, MESSAGE, self.next_number(), item))

    def step(self, time: int, order: int, item: Any) -> None:
        """The end of an engine step at `time`; `order` is the number of the instance."""
        heapq.heappush(self.heap, (time, STEP, order, item))

    def next_time(self) -> int:
        """When the next entry is due; `NEVER` if there is none."""
        return self.heap[0][0] if self.heap else NEVER

    def pop(self) -> Entry:
        """The next entry; the clock moves to it."""
        entry = heapq.heappop(self.heap)
        self.now = entry[0]
        return entry
