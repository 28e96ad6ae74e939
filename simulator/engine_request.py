"""One live request inside an engine model.

Invariant: while it decodes, `computed` and `generated` are those of the moment it began to; what
they are now follows from the engine's progress (`engine_base`). Times are picoseconds; -1: never.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any


class Phase(IntEnum):
    """Where a request stands on its instance."""

    AWAY = 0
    """On no instance, or its instance is dead."""
    WAITING = 1
    """It holds no KV."""
    PREFILLING = 2
    DECODING = 3
    SUSPENDED = 4
    """It holds all its KV and is not scheduled."""
    HOLDING = 5
    """It holds all its KV and waits for a place in the batch."""
    ENDED = 6


class LiveRequest:
    """Mutable, made at arrival and dropped when the request ends."""

    __slots__ = (
        "arrival",
        "computed",
        "dispatched",
        "downtime",
        "entry",
        "execution_priority",
        "finish_step",
        "first_token",
        "generated",
        "hashes",
        "held",
        "inbound",
        "itl_max",
        "join_step",
        "killed",
        "last_token",
        "loss",
        "migration",
        "moved",
        "num_blocks",
        "num_migrations",
        "num_output",
        "num_preemptions",
        "num_prompt",
        "offset",
        "phase",
        "place",
        "predicted",
        "request_id",
        "row",
        "scheduled",
        "target",
    )

    def __init__(
        self,
        row: int,
        request_id: str,
        num_prompt: int,
        num_output: int,
        execution_priority: int,
        arrival: int,
        hashes: Sequence[int],
    ) -> None:
        self.row = row
        self.request_id = request_id
        self.num_prompt = num_prompt
        self.num_output = num_output
        self.execution_priority = execution_priority
        self.arrival = arrival
        self.hashes = hashes
        self.predicted: int | None = None
        self.phase = 0
        self.place: Any = None
        """The engine it is on."""
        self.generated = 0
        """Output tokens produced."""
        self.computed = 0
        """Tokens whose KV is here."""
        self.target = num_prompt
        """Tokens to compute before it decodes: prompt, and what was produced before an eviction."""
        self.num_blocks = 0
        """KV blocks it holds while it does not decode."""
        self.held: list[int] = []
        """Hashes of the blocks among them that are named."""
        self.offset = 0
        """Computed tokens less the engine's progress, while it decodes."""
        self.finish_step = 0
        """The engine's progress at which its last token comes."""
        self.join_step = 0
        self.entry = -1
        """Number of its entry in the engine's heap of ends; -1: it has none."""
        self.dispatched = -1
        self.scheduled = -1
        self.first_token = -1
        self.last_token = -1
        """When its last token came, as far as `generated` counts."""
        self.itl_max = 0
        self.num_preemptions = 0
        self.killed = -1
        self.loss = 0
        self.num_migrations = 0
        self.moved = -1
        """When it came to its instance by a migration."""
        self.downtime = 0
        self.migration: Any = None
        """The migration by which it is leaving."""
        self.inbound: Any = None
        """The record of the migration by which it came, until its first token here."""
