"""Requests held until an instance takes them: higher class first, first come first served within,
or in fair turns of the clients where requests bear tags (`fairness`).

Invariants: a request is in it at most once; within a class the order is that of tags, then of
arrival, also for one that comes back because its instance died.
This module does not know why a request is held, who may take it, or how long the queue may get.
"""

import bisect
from collections import Counter
from collections.abc import Iterator
from itertools import islice

from llumsched.core.scheduling.request_ledger import RequestRecord

_Key = tuple[int, float, int]


def _key(record: RequestRecord) -> _Key:
    return (-record.request.scheduling_priority, record.fair_tag, record.sequence)


class DispatchQueue:
    """Two sorted lists of keys: by dispatch order and by deadline."""

    def __init__(self) -> None:
        self._records: dict[_Key, tuple[float, RequestRecord]] = {}
        self.order: list[_Key] = []
        """Keys in dispatch order. Read it, to see at little cost whether anything is held."""
        self._deadlines: list[tuple[float, _Key]] = []
        self._num_of_client: Counter[str | None] = Counter()

    def __len__(self) -> int:
        return len(self.order)

    def push(self, record: RequestRecord, deadline_s: float) -> None:
        """Hold a request until it is removed; `expired` names it after its deadline."""
        key = _key(record)
        record.is_held = True
        self._num_of_client[record.request.client_id] += 1
        self._records[key] = (deadline_s, record)
        bisect.insort(self.order, key)
        bisect.insort(self._deadlines, (deadline_s, key))

    def remove(self, record: RequestRecord) -> None:
        """Stop holding a request."""
        key = _key(record)
        record.is_held = False
        deadline_s, _ = self._records.pop(key)
        del self.order[bisect.bisect_left(self.order, key)]
        del self._deadlines[bisect.bisect_left(self._deadlines, (deadline_s, key))]
        client_id = record.request.client_id
        self._num_of_client[client_id] -= 1
        if not self._num_of_client[client_id]:
            del self._num_of_client[client_id]

    def postpone(self, deadline_s: float) -> None:
        """Let nothing that is held expire before this time."""
        for key, (before_s, record) in self._records.items():
            self._records[key] = (max(before_s, deadline_s), record)
        self._deadlines = sorted((at_s, key) for key, (at_s, _) in self._records.items())

    def num_of_client(self, client_id: str | None) -> int:
        """How many requests of a client are held."""
        return self._num_of_client[client_id]

    def backwards(self) -> Iterator[RequestRecord]:
        """Held requests, the last in dispatch order first."""
        return (self._records[key][1] for key in reversed(self.order))

    def in_order(self, limit: int | None = None) -> Iterator[RequestRecord]:
        """Held requests in dispatch order; do not change the queue while iterating."""
        return (self._records[key][1] for key in islice(self.order, limit))

    def expired(self, now: float) -> list[RequestRecord]:
        """Requests whose deadline has come, earliest first; they stay until removed."""
        due = bisect.bisect_right(self._deadlines, now, key=lambda entry: entry[0])
        return [self._records[key][1] for _, key in self._deadlines[:due]]

    def next_deadline(self) -> float | None:
        """When the next held request expires."""
        return self._deadlines[0][0] if self._deadlines else None

    def deadline(self, record: RequestRecord) -> float | None:
        """When a held request expires; None for one that is not held."""
        held = self._records.get(_key(record))
        return None if held is None else held[0]
