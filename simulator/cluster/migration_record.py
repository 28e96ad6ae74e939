"""One migration in the simulated cluster: its records at both ends, and what it holds where.

This module does not know what happens to it (`cluster_migration`, `cluster_reservation`).
"""

from __future__ import annotations

from collections.abc import Sequence

from llumsched.core.actions import StartMigration
from llumsched.core.migration.destination.machine import absent
from llumsched.core.migration.source.machine import Migration
from llumsched.simulator.engines.base import Engine
from llumsched.simulator.engines.request import LiveRequest


class Move:
    """Mutable; kept until the end of the simulation, for its record. Times are picoseconds."""

    migration: Migration
    """The source's record."""
    end: int = -1
    outcome: str = ""
    num_blocks_copied: int = 0
    downtime: int = -1
    """From the last token at the source to the first at the destination."""
    source_blocks: int = 0
    source_held: Sequence[int] = ()
    """What the request holds at the source while it may have moved already."""
    source_progress: tuple[int, int] = (0, 0)
    """Its tokens computed and produced when it was suspended."""
    num_reserved: int = 0
    """Blocks at the destination, those found in its cache not counted."""
    held: Sequence[int] = ()
    """Hashes of the blocks found in its cache."""
    is_admitted: bool = False
    """The destination has taken the request over."""

    def __init__(
        self,
        order: StartMigration,
        request: LiveRequest,
        source: Engine,
        destination: Engine,
        now: int,
    ) -> None:
        self.order = order
        self.request = request
        self.source = source
        self.destination = destination
        self.start = now
        self.skipped = source.kernel.skipped
        """Idle time cut out before it; none is during it."""
        self.reservation = absent(order.migration_id)

    @property
    def migration_id(self) -> str:
        """The scheduler's name of it."""
        return self.order.migration_id


class OpenMoves:
    """Moves that are under way, by the index of an instance."""

    def __init__(self) -> None:
        self._by_instance: dict[int, dict[str, Move]] = {}
        self.num_open = 0

    def add(self, index: int, move: Move) -> None:
        """One begins."""
        self._by_instance.setdefault(index, {})[move.migration_id] = move
        self.num_open += 1

    def remove(self, index: int, move: Move) -> bool:
        """One is over; whether it was there."""
        if self._by_instance.get(index, {}).pop(move.migration_id, None) is None:
            return False
        self.num_open -= 1
        return True

    def of(self, index: int) -> list[Move]:
        """Migrations of an instance, in the order in which they began."""
        return list(self._by_instance.get(index, {}).values())

    def all(self) -> list[Move]:
        """Migrations of every instance."""
        return [move for moves in self._by_instance.values() for move in moves.values()]

    def count(self, index: int) -> int:
        """How many an instance has."""
        return len(self._by_instance.get(index, ()))
