"""Both tables, walked: each pair is handled as listed, and no state is a dead end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from llumsched.core.migration.destination import machine as destination
from llumsched.core.migration.destination import rules as destination_rules
from llumsched.core.migration.destination.events import ReservationState
from llumsched.core.migration.destination.record import Reservation
from llumsched.core.migration.messages import CommitRefused, ReservationRejected
from llumsched.core.migration.source import machine as source
from llumsched.core.migration.source import rules
from llumsched.core.migration.source.events import FinishedAtSource, MigrationState, ResumeRequest
from llumsched.core.migration.source.record import TERMINAL_STATES, Migration
from llumsched.core.migration.table import IllegalTransition
from tests.migration_table.samples import (
    destination_events,
    make_migration,
    make_reservation,
    source_events,
)


@dataclass(frozen=True, kw_only=True)
class End:
    """One end of a migration, as far as walking its table goes."""

    name: str
    table: Any
    advance: Callable[..., Any]
    records: Callable[[Any], Iterator[Any]]
    events: Callable[[Any], dict[Any, Any]]
    terminal: frozenset[Any]

    def __str__(self) -> str:
        return self.name


def _migrations(state: MigrationState) -> Iterator[Migration]:
    for abort_requested in (False, True):
        for destination_is_dead in (False, True):
            yield make_migration(
                state, abort_requested=abort_requested, destination_is_dead=destination_is_dead
            )


def _reservations(state: ReservationState) -> Iterator[Reservation]:
    for source_is_dead in (False, True):
        yield make_reservation(state, source_is_dead=source_is_dead)


ENDS = (
    End(
        name="source",
        table=rules.TABLE,
        advance=source.advance,
        records=_migrations,
        events=source_events,
        terminal=TERMINAL_STATES,
    ),
    End(
        name="destination",
        table=destination_rules.TABLE,
        advance=destination.advance,
        records=_reservations,
        events=destination_events,
        terminal=frozenset({ReservationState.ABSENT}),
    ),
)

both_ends = pytest.mark.parametrize("end", ENDS, ids=str)


def _cases(end: End, pairs: Any) -> Iterator[tuple[Any, Any]]:
    for state, event_type in sorted(pairs, key=lambda pair: (pair[0], pair[1].__name__)):
        for record in end.records(state):
            for event in end.events(record)[event_type]:
                yield record, event


@both_ends
def test_an_illegal_event_raises_and_changes_nothing(end: End) -> None:
    for record, event in _cases(end, end.table.illegal):
        before = replace(record)
        with pytest.raises(IllegalTransition, match=f"{type(event).__name__} cannot occur"):
            end.advance(record, event)
        assert record == before


@both_ends
def test_an_ignored_event_changes_nothing_and_asks_for_nothing(end: End) -> None:
    for record, event in _cases(end, end.table.ignored):
        assert end.advance(record, event) == (record, ())


@both_ends
def test_a_handled_event_leads_where_one_of_its_rules_says(end: End) -> None:
    for record, event in _cases(end, end.table.rules):
        after, commands = end.advance(record, event)
        outcomes = {
            (rule.to, tuple(command(after) for command in rule.do))
            for rule in end.table.rules[record.state, type(event)]
        }
        assert (after.state, commands) in outcomes


@both_ends
def test_every_rule_is_chosen_for_some_record(end: End) -> None:
    for (state, event_type), candidates in end.table.rules.items():
        chosen = set()
        for record, event in _cases(end, [(state, event_type)]):
            after, commands = end.advance(record, event)
            for index, rule in enumerate(candidates):
                expected = tuple(command(after) for command in rule.do)
                reason = getattr(after, "abort_reason", None) or getattr(
                    after, "release_reason", None
                )
                if (rule.to, expected, rule.reason) == (after.state, commands, reason):
                    chosen.add(index)
        assert chosen == set(range(len(candidates))), (state, event_type)


@both_ends
def test_a_pair_that_is_listed_twice_or_nowhere_is_refused(end: End) -> None:
    pair = next(iter(end.table.illegal))
    with pytest.raises(ValueError, match="exactly one"):
        replace(end.table, illegal=end.table.illegal - {pair})
    with pytest.raises(ValueError, match="exactly one"):
        replace(end.table, ignored=end.table.ignored | {pair})


@both_ends
def test_an_unguarded_rule_is_the_last_one(end: End) -> None:
    pair, candidates = next(iter(end.table.rules.items()))
    unguarded = candidates[-1]
    with pytest.raises(ValueError, match="never reached"):
        replace(end.table, rules={**end.table.rules, pair: (unguarded, unguarded)})
    guarded = replace(unguarded, when=lambda _record: True)
    with pytest.raises(ValueError, match="no guard"):
        replace(end.table, rules={**end.table.rules, pair: (guarded,)})


@both_ends
def test_every_state_reaches_an_end(end: End) -> None:
    successors: dict[Any, set[Any]] = {state: set() for state in end.table.states}
    for (state, _), candidates in end.table.rules.items():
        successors[state] |= {rule.to for rule in candidates}
    reaching = set(end.terminal)
    while more := {s for s, after in successors.items() if after & reaching} - reaching:
        reaching |= more
    assert reaching == set(end.table.states)


# What the table must never say, whatever else changes in it.

BEFORE_COMMIT = frozenset({rules.RESERVING, rules.COPYING, rules.SUSPENDING})
SUSPENDED = frozenset({rules.SUSPENDING, rules.COMMITTING, rules.RESOLVING})


def _aborting_rules() -> Iterator[tuple[Any, Any, Any]]:
    for (state, event_type), candidates in rules.TABLE.rules.items():
        for rule in candidates:
            if rule.to is rules.ABORTED:
                yield state, event_type, rule


def test_an_abort_leaves_no_request_suspended() -> None:
    for state, event_type, rule in _aborting_rules():
        endings = [c for c in rule.do if c is rules.resume_request or c is rules.release_request]
        if state in SUSPENDED and event_type is not FinishedAtSource:
            assert len(endings) == 1, (state, event_type)


def test_an_abort_before_the_commit_releases_the_destination() -> None:
    for state, event_type, rule in _aborting_rules():
        if event_type is not ReservationRejected:
            assert (rules.release_reservation in rule.do) == (state in BEFORE_COMMIT)


def test_after_the_commit_was_sent_only_a_refusal_or_a_death_resumes() -> None:
    for state, event_type, rule in _aborting_rules():
        if state not in BEFORE_COMMIT:
            refused = event_type is CommitRefused
            dead = rule.when in (rules.destination_is_dead, rules.dead_and_abort_requested)
            assert refused or dead, (state, event_type)


def test_a_client_that_aborted_never_gets_its_request_resumed() -> None:
    for state in (rules.COMMITTING, rules.RESOLVING):
        migration = make_migration(state, abort_requested=True)
        for events in source_events(migration).values():
            for event in events:
                if (state, type(event)) not in rules.TABLE.illegal:
                    _, commands = source.advance(migration, event)
                    assert not any(isinstance(c, ResumeRequest) for c in commands)


def test_every_wait_has_a_deadline_but_that_for_the_engine() -> None:
    for state in MigrationState:
        assert (source.wait(make_migration(state)) is None) == (state in TERMINAL_STATES)
    unlimited = {s for s in ReservationState if destination.wait(make_reservation(s)) is None}
    assert unlimited == {ReservationState.ABSENT, ReservationState.ADMITTING}
