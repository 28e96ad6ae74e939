"""Transition tables as data: what both ends of a migration are made of.

A table maps (state, event type) to rules. An event is handled in three steps: its facts are
absorbed into the record, the first rule whose guard holds for that record is chosen, and the record
enters the rule's state, which yields the commands. Guards and commands see only the record.

Invariant: every (state, event type) either has rules, or is ignored, or is illegal, as listed.
Knows nothing about migration, engines, links or clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import Generic, TypeVar

StateT = TypeVar("StateT", bound=StrEnum)
RecordT = TypeVar("RecordT")
EventT = TypeVar("EventT")
CommandT = TypeVar("CommandT")


class IllegalTransition(Exception):
    """An event that cannot occur in this state: a defect in the host, not in the network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule(Generic[StateT, RecordT, CommandT]):
    """One outcome of an event: where the record goes and what is to be done.

    `when` is the guard; the last rule of an entry has none. `reason` says why a record ends here.
    """

    to: StateT
    do: tuple[Callable[[RecordT], CommandT], ...] = ()
    when: Callable[[RecordT], bool] | None = None
    reason: StrEnum | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitionTable(Generic[StateT, RecordT, EventT, CommandT]):
    """The rules of one end, and the pairs that have none on purpose."""

    states: type[StateT]
    events: tuple[type[EventT], ...]
    rules: Mapping[tuple[StateT, type[EventT]], tuple[Rule[StateT, RecordT, CommandT], ...]]
    ignored: frozenset[tuple[StateT, type[EventT]]]
    illegal: frozenset[tuple[StateT, type[EventT]]]

    def __post_init__(self) -> None:
        for (state, event), rules in self.rules.items():
            if not rules or rules[-1].when is not None:
                raise ValueError(f"({state}, {event.__name__}) needs a last rule with no guard")
            if any(rule.when is None for rule in rules[:-1]):
                raise ValueError(f"({state}, {event.__name__}) has a rule that is never reached")
        for state, event in self:
            listings = ((state, event) in part for part in (self.rules, self.ignored, self.illegal))
            if sum(listings) != 1:
                raise ValueError(
                    f"({state}, {event.__name__}) must have rules, be ignored or be illegal: "
                    "exactly one of them"
                )

    def __iter__(self) -> Iterator[tuple[StateT, type[EventT]]]:
        """Every (state, event type), handled or not."""
        return iter(product(self.states, self.events))

    def choose(
        self, state: StateT, event: EventT, record: RecordT
    ) -> Rule[StateT, RecordT, CommandT] | None:
        """The rule for `event`, whose facts `record` has absorbed; None if the pair is ignored."""
        pair = (state, type(event))
        if pair in self.ignored:
            return None
        for rule in self.rules.get(pair, ()):
            if rule.when is None or rule.when(record):
                return rule
        legal = sorted(event.__name__ for other, event in self.rules if other is state)
        raise IllegalTransition(
            f"{type(event).__name__} cannot occur in {state}, which handles {', '.join(legal)}"
        )
