"""One migration in the simulated cluster: both of its ends, and what it holds where.

This module does not know what happens to it (`migration_source`, `migration_destination`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from llumsched.core.actions import StartMigration
from llumsched.core.migration.destination.events import DestinationCommand, DestinationEvent
from llumsched.core.migration.destination.record import Reservation
from llumsched.core.migration.driver import End, MigrationDriver, Record
from llumsched.core.migration.source.events import SourceCommand, SourceEvent
from llumsched.core.migration.source.record import Migration
from llumsched.simulator.engines.base import Engine
from llumsched.simulator.engines.request import LiveRequest
from llumsched.simulator.kernel import Kernel, to_ps

RecordT = TypeVar("RecordT", bound=Record)
EventT = TypeVar("EventT")
CommandT = TypeVar("CommandT")
EventT_contra = TypeVar("EventT_contra", contravariant=True)
CommandT_contra = TypeVar("CommandT_contra", contravariant=True)


class Side(Protocol[EventT_contra, CommandT_contra]):
    """All migrations at their sources, or at their destinations."""

    def handle(self, move: Move, event: EventT_contra, now: int) -> None:
        """Something has happened to a move."""

    def carry_out(self, move: Move, command: CommandT_contra, now: int) -> None:
        """Carry out a command of a move's table."""


class EndOfMove(Generic[RecordT, EventT, CommandT]):
    """The host of one end of a move, in virtual time.

    Timers are not taken back: what they bring is dropped if it comes late.
    """

    __slots__ = ("_kernel", "_move", "_side", "driver")

    def __init__(
        self,
        end: End[RecordT, EventT, CommandT],
        record: RecordT,
        side: Side[EventT, CommandT],
        move: Move,
        kernel: Kernel,
    ) -> None:
        self.driver = MigrationDriver(end, self, record)
        self._side = side
        self._move = move
        self._kernel = kernel

    def execute(self, command: CommandT) -> None:
        self._side.carry_out(self._move, command, self._kernel.now)

    def set_timer(self, timeout_s: float, event: EventT) -> None:
        if timeout_s == math.inf:
            return
        side, move = self._side, self._move
        self._kernel.send(
            self._kernel.now + to_ps(timeout_s), lambda at: side.handle(move, event, at)
        )

    def clear_timer(self) -> None:
        pass


class Move:
    """Mutable; kept until the end of the simulation, for its record. Times are picoseconds."""

    leaving: EndOfMove[Migration, SourceEvent, SourceCommand]
    arriving: EndOfMove[Reservation, DestinationEvent, DestinationCommand]
    end: int = -1
    outcome: str = ""
    num_blocks_copied: int = 0
    downtime: int = -1
    """From the last token at the source to the first at the destination."""
    source_blocks: int = 0
    source_held: Sequence[int] = ()
    """Blocks that the request holds at the source while it may have moved already."""
    source_progress: tuple[int, int] = (0, 0)
    """Tokens computed and produced when it was suspended."""
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

    @property
    def migration(self) -> Migration:
        """The source's record."""
        return self.leaving.driver.record

    @property
    def reservation(self) -> Reservation:
        """The destination's record."""
        return self.arriving.driver.record

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
