"""One end of one migration, driven: the loop that every host of a table needs.

An event is dropped unless it is current; the table advances the record; if its state or stage
changed, or a wait is over and changed neither, the host's timer begins anew; then the host carries
out the commands, in order. The runtime's two ends, the simulator's two and the tests' worlds are
hosts of this one driver.

Invariant: at most one timer runs, that of the record as it stands. Knows no clock, no engine, no
link and no thread: a host calls `handle` with one event at a time.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Generic, Protocol, TypeVar

from llumsched.core.migration.events import DeadlineExpired

EventT = TypeVar("EventT")
CommandT = TypeVar("CommandT")
CommandT_co = TypeVar("CommandT_co", covariant=True)
CommandT_contra = TypeVar("CommandT_contra", contravariant=True)
EventT_contra = TypeVar("EventT_contra", contravariant=True)


class Record(Protocol):
    """A migration or a reservation, as far as the driver looks at it."""

    @property
    def state(self) -> StrEnum:
        """State of the table that the record is in."""

    @property
    def stage(self) -> int:
        """Number of the latest stage of blocks."""


RecordT = TypeVar("RecordT", bound=Record)


class End(Protocol[RecordT, EventT, CommandT_co]):
    """The functions of one end: the modules `source.machine` and `destination.machine`."""

    def is_current(self, record: RecordT, event: EventT, /) -> bool:
        """True if the event is about the record as it stands."""

    def advance(self, record: RecordT, event: EventT, /) -> tuple[RecordT, tuple[CommandT_co, ...]]:
        """The record after the event, and what is to be done about it, in order."""

    def wait(self, record: RecordT, /) -> tuple[float, EventT] | None:
        """After how many seconds in this state which event is due; `None` if there is no limit."""


class Host(Protocol[EventT_contra, CommandT_contra]):
    """Surroundings of one end: a timer, an engine and a link."""

    def execute(self, command: CommandT_contra, /) -> None:
        """Carry out a command, or queue it behind those before it. Messages are commands too."""

    def set_timer(self, timeout_s: float, event: EventT_contra, /) -> None:
        """Have the driver handle `event` after `timeout_s`, and no event of an earlier timer."""

    def clear_timer(self) -> None:
        """No timer runs any more."""


class MigrationDriver(Generic[RecordT, EventT, CommandT]):
    """Drives `record` through the table of `end` on `host`. `record` is replaced, never changed."""

    __slots__ = ("_end", "_host", "record")

    def __init__(
        self, end: End[RecordT, EventT, CommandT], host: Host[EventT, CommandT], record: RecordT
    ) -> None:
        self._end = end
        self._host = host
        self.record = record

    def begin(self, commands: tuple[CommandT, ...]) -> None:
        """Start the first timer and carry out the commands that a migration begins with."""
        self._restart_timer()
        for command in commands:
            self._host.execute(command)

    def handle(self, event: EventT) -> bool:
        """Take in an event; whether it was current.

        Raises:
            IllegalTransition: for an event that cannot occur in this state; nothing has changed.
        """
        before = self.record
        if not self._end.is_current(before, event):
            return False
        self.record, commands = self._end.advance(before, event)
        moved = (self.record.state, self.record.stage) != (before.state, before.stage)
        if moved or isinstance(event, DeadlineExpired):
            self._restart_timer()
        for command in commands:
            self._host.execute(command)
        return True

    def _restart_timer(self) -> None:
        wait = self._end.wait(self.record)
        if wait is None:
            self._host.clear_timer()
        else:
            self._host.set_timer(*wait)
