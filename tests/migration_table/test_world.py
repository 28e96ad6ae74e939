"""Every interleaving that bytes can spell: two tables, a bad link, crashes and clients.

`LLUMSCHED_MIGRATION_RUNS=20000 pytest tests/migration_table/test_world.py` runs more worlds than
the default; from 20,000 on every rule that can be reached has to have been taken.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llumsched.core.migration.destination import machine as destination
from llumsched.core.migration.destination import rules as destination_rules
from llumsched.core.migration.source import machine as source
from llumsched.core.migration.source import rules as source_rules
from llumsched.core.migration.table import IllegalTransition, Rule, TransitionTable
from llumsched.engine.base import FinalState
from tests.campaigns import examples
from tests.fake_engine.engine import FakeEngine
from tests.migration_table.world import World

NUM_RUNS = int(os.environ.get("LLUMSCHED_MIGRATION_RUNS", "1200"))
NUM_RUNS_THAT_TAKE_EVERY_RULE = 20_000


def acts_of(seed: int) -> bytes:
    generator = random.Random(seed)
    return generator.randbytes(2 * generator.randrange(40, 240))


def run_worlds(num_runs: int) -> None:
    for seed in range(num_runs):
        try:
            World(seed).run(acts_of(seed))
        except Exception as error:
            error.add_note(f"World({seed}).run(acts_of({seed}))")
            raise


@settings(max_examples=examples(250))
@given(seed=st.integers(0, 2**32), acts=st.binary(max_size=400))
def test_hypothesis_finds_no_violation(seed: int, acts: bytes) -> None:
    World(seed).run(acts)


def test_random_worlds_end_well() -> None:
    taken: Counter[tuple[Any, Any, int]] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransitionTable, "choose", _counting(TransitionTable.choose, taken))
        run_worlds(NUM_RUNS)
    if NUM_RUNS >= NUM_RUNS_THAT_TAKE_EVERY_RULE:
        assert {rule for rule in _all_rules() if not taken[rule]} == UNREACHABLE


def _counting(
    choose: Callable[..., Any], taken: Counter[tuple[Any, Any, int]]
) -> Callable[..., Any]:
    def counting(table: Any, state: Any, event: Any, record: Any) -> Any:
        rule = choose(table, state, event, record)
        if rule is not None:
            pair = (state, type(event))
            taken[*pair, table.rules[pair].index(rule)] += 1
        return rule

    return counting


def _all_rules() -> Iterator[tuple[Any, Any, int]]:
    tables: tuple[Any, ...] = (source.TABLE, destination.TABLE)
    for table in tables:
        for pair, candidates in table.rules.items():
            for index in range(len(candidates)):
                yield (*pair, index)


UNREACHABLE: set[tuple[Any, Any, int]] = {
    # The fake engine refuses to suspend a request that was preempted.
    (source_rules.SUSPENDING, source.RequestSuspended, 0),
    # A tombstone outlives its migration's messages, so nothing is asked of a forgotten one.
    (destination_rules.ABSENT, destination.StageAnnounced, 0),
    (destination_rules.ABSENT, destination.CommitRequested, 0),
    (destination_rules.ABSENT, destination.CommitQueried, 0),
    # A source commits, and asks after a commit, only when the destination has confirmed.
    (destination_rules.ALLOCATING, destination.CommitRequested, 0),
    (destination_rules.ALLOCATING, destination.CommitQueried, 0),
    # It announces a stage only when the one before was confirmed.
    (destination_rules.RESERVED, destination.StageAnnounced, 1),
    (destination_rules.RECEIVING, destination.StageAnnounced, 1),
    (destination_rules.COMMIT_PENDING, destination.StageAnnounced, 1),
    # The stage that comes with a commit is the last.
    (destination_rules.COMMIT_PENDING, destination.BlocksWritten, 1),
}
"""Rules against hosts and engines other than these; the tables' own tests take them."""


# The worlds notice what is wrong: each of these mistakes has been made by somebody.


def _source_rule(patch: pytest.MonkeyPatch, state: Any, event: Any, rule: Any) -> None:
    changed = {**source.TABLE.rules, (state, event): (rule,)}
    patch.setattr(source, "TABLE", replace(source.TABLE, rules=changed))


def _destination_rule(patch: pytest.MonkeyPatch, state: Any, event: Any, rule: Any) -> None:
    changed = {**destination.TABLE.rules, (state, event): (rule,)}
    patch.setattr(destination, "TABLE", replace(destination.TABLE, rules=changed))


def resume_when_the_commit_is_not_answered(patch: pytest.MonkeyPatch) -> None:
    rule = Rule(
        to=source_rules.ABORTED,
        do=(source_rules.resume_request,),
        reason=source.AbortReason.DEADLINE_EXPIRED,
    )
    _source_rule(patch, source_rules.COMMITTING, source.DeadlineExpired, rule)


def resume_when_the_link_breaks(patch: pytest.MonkeyPatch) -> None:
    rule = Rule(
        to=source_rules.ABORTED,
        do=(source_rules.resume_request,),
        reason=source.AbortReason.PEER_LOST,
    )
    _source_rule(patch, source_rules.RESOLVING, source.PeerLost, rule)


def answer_a_query_and_accept_the_commit_later(patch: pytest.MonkeyPatch) -> None:
    rule = Rule(to=destination_rules.RECEIVING, do=(destination_rules.refuse_commit,))
    _destination_rule(patch, destination_rules.RECEIVING, destination.CommitQueried, rule)


def admit_before_the_last_blocks(patch: pytest.MonkeyPatch) -> None:
    rule = Rule(to=destination_rules.ADMITTING, do=(destination_rules.admit_request,))
    _destination_rule(patch, destination_rules.RECEIVING, destination.CommitRequested, rule)


def answer_a_query_and_wait_for_the_last_blocks(patch: pytest.MonkeyPatch) -> None:
    rule = Rule(to=destination_rules.COMMIT_PENDING, do=(destination_rules.refuse_commit,))
    _destination_rule(patch, destination_rules.COMMIT_PENDING, destination.CommitQueried, rule)


def forget_a_commit(patch: pytest.MonkeyPatch) -> None:
    rule = Rule(to=destination_rules.COMMITTED, do=(destination_rules.refuse_commit,))
    _destination_rule(patch, destination_rules.COMMITTED, destination.CommitQueried, rule)


def ignore_an_abort_during_the_commit(patch: pytest.MonkeyPatch) -> None:
    pair = (source_rules.COMMITTING, source.RequestAborted)
    others = {other: rules for other, rules in source.TABLE.rules.items() if other != pair}
    table = replace(source.TABLE, rules=others, ignored=source.TABLE.ignored | {pair})
    patch.setattr(source, "TABLE", table)


def lose_an_abort_after_the_commit(patch: pytest.MonkeyPatch) -> None:
    rule: source_rules.SourceRule = Rule(to=source_rules.COMMITTED)
    _source_rule(patch, source_rules.COMMITTED, source.RequestAborted, rule)


def leave_the_request_suspended(patch: pytest.MonkeyPatch) -> None:
    rule = Rule(
        to=source_rules.ABORTED,
        do=(source_rules.release_destination,),
        reason=source.AbortReason.DEADLINE_EXPIRED,
    )
    _source_rule(patch, source_rules.SUSPENDING, source.DeadlineExpired, rule)


def leak_an_expired_reservation(patch: pytest.MonkeyPatch) -> None:
    rule = Rule(
        to=destination_rules.RELEASED,
        do=(destination_rules.reject_reservation,),
        reason=destination.ReleaseReason.EXPIRED,
    )
    _destination_rule(patch, destination_rules.RECEIVING, destination.ReservationExpired, rule)


def believe_late_messages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(source, "is_current", lambda _migration, _event: True)


def copy_blocks_that_are_being_written(patch: pytest.MonkeyPatch) -> None:
    def pin_too_much(self: FakeEngine, request_id: str) -> Any:
        export = self._exports[request_id]
        if self._lives(export):
            self._pin(export, export.request.num_computed_tokens // self.block_size)
        return self._copyable(export)

    patch.setattr(FakeEngine, "pin_copyable", pin_too_much)


def leave_the_generator_behind(patch: pytest.MonkeyPatch) -> None:
    commit = FakeEngine.commit

    def commit_without(self: FakeEngine, request_id: str, final: FinalState) -> None:
        commit(self, request_id, msgspec.structs.replace(final, generator_state=b"1"))

    patch.setattr(FakeEngine, "commit", commit_without)


MISTAKES = (
    resume_when_the_commit_is_not_answered,
    resume_when_the_link_breaks,
    answer_a_query_and_accept_the_commit_later,
    admit_before_the_last_blocks,
    answer_a_query_and_wait_for_the_last_blocks,
    forget_a_commit,
    ignore_an_abort_during_the_commit,
    lose_an_abort_after_the_commit,
    leave_the_request_suspended,
    leak_an_expired_reservation,
    believe_late_messages,
    copy_blocks_that_are_being_written,
    leave_the_generator_behind,
)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_noticed(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    # ValueError: a stage that is not as long as its blocks.
    with pytest.raises((AssertionError, IllegalTransition, ValueError)):
        run_worlds(3_000)
