"""One live request inside an engine model.

Invariant: while it decodes, `computed` and `generated` are those of the moment it began to; what
they are now follows from the engine's progress (`engine_batch`). Times are picoseconds; -1: never.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class Phase(IntEnum):
    """Where a request stands on its instance."""

    AWAY = 0
    """On no instance, or its instance is dead."""
    WAITING = 1
    """Without KV."""
    PREFILLING = 2
    DECODING = 3
    SUSPENDED = 4
    """With all its KV, and not scheduled."""
    HOLDING = 5
    """With all its KV, waiting for a place in the batch."""
    ENDED = 6


# The same as plain numbers: they are written and compared several times for every request.
AWAY, WAITING, PREFILLING, DECODING, SUSPENDED, HOLDING, ENDED = map(int, Phase)


@dataclass(slots=True, eq=False)
class LiveRequest:
    """Mutable, made at arrival and dropped when the request ends."""

    row: int
    request_id: str
    num_prompt: int
    num_output: int
    execution_priority: int
    arrival: int
    hashes: Sequence[int]
    phase: int = AWAY
    place: Any = None
    """The engine it is on."""
    predicted: int | None = None
    target: int = 0
    """Tokens to compute before it decodes: prompt, and what was produced before an eviction."""
    generated: int = 0
    """Output tokens produced."""
    computed: int = 0
    """Tokens whose KV is here."""
    num_blocks: int = 0
    """KV blocks it holds while it does not decode."""
    offset: int = 0
    """Computed tokens less the engine's progress, while it decodes."""
    finish_step: int = 0
    """The engine's progress at which its last token comes."""
    join_step: int = 0
    entry: int = -1
    """Number of its entry in the engine's heap of ends; -1: it has none."""
    dispatched: int = -1
    scheduled: int = -1
    first_token: int = -1
    last_token: int = -1
    """When its last token came, as far as `generated` counts."""
    itl_max: int = 0
    num_preemptions: int = 0
    num_cached: int = 0
    """Prompt tokens that the prefix cache held when it was first scheduled."""
    killed: int = -1
    """When it last lost its KV."""
    loss: int = 0
    num_migrations: int = 0
    moved: int = -1
    """When it came to its instance by a migration."""
    downtime: int = 0
    migration: Any = None
    """The migration by which it is leaving."""
    inbound: Any = None
    """The record of the migration by which it came, until its first token here."""
    held: Sequence[int] = ()
    """Hashes of the blocks it holds that are named."""
