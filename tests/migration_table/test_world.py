"""Every interleaving that bytes can spell: two tables, a bad link, crashes and clients.

`LLUMSCHED_MIGRATION_RUNS=20000 pytest tests/migration_table/test_world.py` runs more worlds than
the default; from 20,000 on every rule that can be reached has to have been taken.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llumsched.core.migration.destination import machine as destination
from llumsched.core.migration.destination import rules as destination_rules
from llumsched.core.migration.destination.events import BlocksWritten, RequestAdmitted
from llumsched.core.migration.destination.record import ReleaseReason
from llumsched.core.migration.events import DeadlineExpired, PeerLost
from llumsched.core.migration.groups import BlockOrder
from llumsched.core.migration.messages import (
    AbortAtDestination,
    BlocksCopied,
    BlocksReserved,
    CommitAcknowledged,
    CommitRequest,
    CopyBlocks,
    QueryCommit,
)
from llumsched.core.migration.source import machine as source
from llumsched.core.migration.source import rules as source_rules
from llumsched.core.migration.source.events import AbortedAtSource, RequestSuspended
from llumsched.core.migration.source.record import AbortReason
from llumsched.core.migration.table import IllegalTransition, Rule, TransitionTable
from llumsched.engine.base import FinalState
from llumsched.migration.destination import IncomingMigration
from llumsched.migration.runs import runs_of
from tests.campaigns import examples
from tests.fake_engine.engine import FakeEngine
from tests.fake_engine.grouped import GroupedEngine
from tests.migration_table.prefix_world import PrefixWorld
from tests.migration_table.world import World

NUM_RUNS = int(os.environ.get("LLUMSCHED_MIGRATION_RUNS", "600"))
NUM_RUNS_THAT_TAKE_EVERY_RULE = 20_000


def acts_of(seed: int) -> bytes:
    generator = random.Random(seed)
    return generator.randbytes(2 * generator.randrange(40, 240))


def run_worlds(seeds: Iterable[int]) -> None:
    for seed in seeds:
        try:
            World(seed).run(acts_of(seed))
        except Exception as error:
            error.add_note(f"World({seed}).run(acts_of({seed}))")
            raise


@settings(max_examples=examples(250))
@given(seed=st.integers(0, 2**32), acts=st.binary(max_size=400))
def test_hypothesis_finds_no_violation(seed: int, acts: bytes) -> None:
    World(seed).run(acts)


@settings(max_examples=examples(250))
@given(seed=st.integers(0, 2**32), acts=st.binary(max_size=400))
def test_prefixes_that_move_change_no_token(seed: int, acts: bytes) -> None:
    PrefixWorld(seed).run(acts)


def test_prefixes_do_move_in_that_world() -> None:
    """Some come, some do not."""
    ends: Counter[str] = Counter()
    for seed in range(60):
        world = PrefixWorld(seed)
        world.run(acts_of(seed))
        for instance in world.instances.values():
            for report in instance.reports.values():
                if report is not None and report.has_ended:
                    ends[report.outcome] += 1
    assert ends["committed"] > 5, ends
    assert ends["aborted"] > 5, ends


@pytest.mark.slow
def test_random_worlds_end_well() -> None:
    taken: Counter[tuple[Any, Any, int]] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransitionTable, "choose", _counting(TransitionTable.choose, taken))
        run_worlds(range(NUM_RUNS))
    if NUM_RUNS >= NUM_RUNS_THAT_TAKE_EVERY_RULE:
        assert {rule for rule in _all_rules() if not taken[rule]} - RARE == UNREACHABLE


@pytest.mark.slow
def test_worlds_of_several_groups_end_well() -> None:
    """Engines with a window and a state beside the blocks of all tokens."""
    _run_grouped(range(NUM_RUNS))


def _run_grouped(seeds: Iterable[int]) -> None:
    for seed in seeds:
        try:
            World(seed, GroupedEngine, more=3).run(acts_of(seed))
        except Exception as error:
            error.add_note(f"World({seed}, GroupedEngine, more=3).run(acts_of({seed}))")
            raise


def leave_states_out(patch: pytest.MonkeyPatch) -> None:
    num_blocks = BlockOrder.num_blocks

    def without(self: BlockOrder, num_tokens: int) -> int:
        return num_blocks(self, num_tokens) - sum(g.num_live_blocks for g in self.groups)

    patch.setattr(BlockOrder, "num_blocks", without)


def copy_states_ahead(patch: pytest.MonkeyPatch) -> None:
    """A state is copied as if it were settled once it is there."""
    pin = GroupedEngine.pin_copyable

    def pin_all(self: GroupedEngine, request_id: str) -> Any:
        export = self._exports[request_id]
        pin(self, request_id)
        tables = self._pinned.setdefault(id(export), ([], [], []))
        if not tables[2] and self._lives(export):
            self._touch(export, tables[2], self._tables_of(export.request)[2])
        return self._copyable(export)

    def live_first(self: BlockOrder, first: int, last: int, num_tokens: int) -> Any:
        states = [(g, 0) for g, group in enumerate(self.groups) if group.is_live]
        settled = [self._place(i) for i in range(self.num_settled(num_tokens))]
        rest = [(g, num_tokens // n) for g, n in self._settled if num_tokens % n]
        return (states + settled + rest)[first:last]

    patch.setattr(GroupedEngine, "pin_copyable", pin_all)
    patch.setattr(BlockOrder, "places", live_first)


def forget_the_window(patch: pytest.MonkeyPatch) -> None:
    def first_group_only(*arguments: Any) -> Any:
        return [run for run in runs_of(*arguments) if run.group != 1]

    patch.setattr("llumsched.migration.source.runs_of", first_group_only)


@pytest.mark.parametrize("mistake", [leave_states_out, copy_states_ahead, forget_the_window])
def test_a_mistake_with_groups_is_noticed(
    monkeypatch: pytest.MonkeyPatch, mistake: Callable[[pytest.MonkeyPatch], None]
) -> None:
    mistake(monkeypatch)
    with pytest.raises(AssertionError, match=r"state is not|never written"):
        _run_grouped(range(200))


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
    tables: tuple[Any, ...] = (source_rules.TABLE, destination_rules.TABLE)
    for table in tables:
        for pair, candidates in table.rules.items():
            for index in range(len(candidates)):
                yield (*pair, index)


UNREACHABLE: set[tuple[Any, Any, int]] = {
    # The fake engine refuses to suspend a request that was preempted.
    (source_rules.SUSPENDING, RequestSuspended, 0),
    # A tombstone outlives its migration's messages, so nothing is asked of a forgotten one.
    (destination_rules.ABSENT, CopyBlocks, 0),
    (destination_rules.ABSENT, CommitRequest, 0),
    (destination_rules.ABSENT, QueryCommit, 0),
    (destination_rules.ABSENT, AbortAtDestination, 0),
    # The host hears of a preemption before it hears what a later look at the engine found.
    (source_rules.RESERVING, BlocksReserved, 0),
    (source_rules.COPYING, BlocksCopied, 0),
    # A source commits, and asks after a commit, only when the destination has confirmed.
    (destination_rules.ALLOCATING, CommitRequest, 0),
    (destination_rules.ALLOCATING, QueryCommit, 0),
    # It announces a stage only when the one before was confirmed.
    (destination_rules.RESERVED, CopyBlocks, 1),
    (destination_rules.RECEIVING, CopyBlocks, 1),
    (destination_rules.COMMIT_PENDING, CopyBlocks, 1),
    # The stage that comes with a commit is the last.
    (destination_rules.COMMIT_PENDING, BlocksWritten, 1),
}
"""Rules against hosts and engines other than these; the tables' own tests take them."""

RARE: set[tuple[Any, Any, int]] = {
    # All of the request was cached there, tail and all, and the commit was lost.
    (destination_rules.RESERVED, QueryCommit, 0),
    # The source dies, and its death is known, while the engine admits the request: one act.
    (destination_rules.ADMITTING, RequestAdmitted, 0),
}
"""Rules that a campaign may miss; tests of their own take them."""


# The worlds notice what is wrong: each of these mistakes has been made by somebody.


def _of(machine: Any) -> Any:
    """The table that a machine goes by."""
    return machine.TABLE


def _source_rule(patch: pytest.MonkeyPatch, state: Any, event: Any, rule: Any) -> None:
    changed = {**_of(source).rules, (state, event): (rule,)}
    patch.setattr(source, "TABLE", replace(_of(source), rules=changed))


def _destination_rule(patch: pytest.MonkeyPatch, state: Any, event: Any, rule: Any) -> None:
    changed = {**_of(destination).rules, (state, event): (rule,)}
    patch.setattr(destination, "TABLE", replace(_of(destination), rules=changed))


def resume_when_the_commit_is_not_answered(patch: pytest.MonkeyPatch) -> None:
    rule = Rule(
        to=source_rules.ABORTED,
        do=(source_rules.resume_request,),
        reason=AbortReason.DEADLINE_EXPIRED,
    )
    _source_rule(patch, source_rules.COMMITTING, DeadlineExpired, rule)


def resume_when_the_link_breaks(patch: pytest.MonkeyPatch) -> None:
    rule = Rule(
        to=source_rules.ABORTED,
        do=(source_rules.resume_request,),
        reason=AbortReason.PEER_LOST,
    )
    _source_rule(patch, source_rules.RESOLVING, PeerLost, rule)


def answer_a_query_and_accept_the_commit_later(patch: pytest.MonkeyPatch) -> None:
    rule = Rule(to=destination_rules.RECEIVING, do=(destination_rules.refuse_commit,))
    _destination_rule(patch, destination_rules.RECEIVING, QueryCommit, rule)


def admit_before_the_last_blocks(patch: pytest.MonkeyPatch) -> None:
    rule = Rule(to=destination_rules.ADMITTING, do=(destination_rules.admit_request,))
    _destination_rule(patch, destination_rules.RECEIVING, CommitRequest, rule)


def answer_a_query_and_wait_for_the_last_blocks(patch: pytest.MonkeyPatch) -> None:
    rule = Rule(to=destination_rules.COMMIT_PENDING, do=(destination_rules.refuse_commit,))
    _destination_rule(patch, destination_rules.COMMIT_PENDING, QueryCommit, rule)


def forget_a_commit(patch: pytest.MonkeyPatch) -> None:
    rule = Rule(to=destination_rules.COMMITTED, do=(destination_rules.refuse_commit,))
    _destination_rule(patch, destination_rules.COMMITTED, QueryCommit, rule)


def ignore_an_abort_during_the_commit(patch: pytest.MonkeyPatch) -> None:
    pair = (source_rules.COMMITTING, AbortedAtSource)
    others = {other: rules for other, rules in source_rules.TABLE.rules.items() if other != pair}
    table = replace(source_rules.TABLE, rules=others, ignored=source_rules.TABLE.ignored | {pair})
    patch.setattr(source, "TABLE", table)


def close_a_migration_that_was_aborted(patch: pytest.MonkeyPatch) -> None:
    rule = Rule(
        to=source_rules.COMMITTED,
        do=(source_rules.release_request, source_rules.close_migration),
    )
    for state in (source_rules.COMMITTING, source_rules.RESOLVING):
        _source_rule(patch, state, CommitAcknowledged, rule)


def give_back_blocks_that_are_being_written(patch: pytest.MonkeyPatch) -> None:
    def cancel_at_once(self: IncomingMigration) -> None:
        if not self._is_allocated:
            request_id = self.record.request_id
            self._call(lambda: self._port.cancel(request_id))

    patch.setattr(IncomingMigration, "_cancel_unused", cancel_at_once)


def believe_that_doubled_blocks_are_new(patch: pytest.MonkeyPatch) -> None:
    store = IncomingMigration.store

    async def store_again(self: IncomingMigration, *arguments: Any) -> None:
        self._blocks_begun.clear()
        await store(self, *arguments)

    patch.setattr(IncomingMigration, "store", store_again)


def leak_an_expired_reservation(patch: pytest.MonkeyPatch) -> None:
    rule = Rule(
        to=destination_rules.RELEASED,
        do=(destination_rules.reject_reservation,),
        reason=ReleaseReason.EXPIRED,
    )
    _destination_rule(patch, destination_rules.RECEIVING, DeadlineExpired, rule)


def copy_blocks_that_are_being_written(patch: pytest.MonkeyPatch) -> None:
    def pin_too_much(self: FakeEngine, request_id: str) -> Any:
        export = self._exports[request_id]
        if self._lives(export):
            export.num_tokens = export.request.num_computed_tokens
            self._pin(export, export.num_tokens // self.block_size)
        return self._copyable(export)

    patch.setattr(FakeEngine, "pin_copyable", pin_too_much)


def leave_the_generator_behind(patch: pytest.MonkeyPatch) -> None:
    commit = FakeEngine.commit

    def commit_without(self: FakeEngine, request_id: str, final: FinalState) -> None:
        commit(self, request_id, msgspec.structs.replace(final, generator_state=b"1"))

    patch.setattr(FakeEngine, "commit", commit_without)


# With a world that notices each of them: the first one, as long as nothing else changes.
MISTAKES = (
    (resume_when_the_commit_is_not_answered, 221),
    (resume_when_the_link_breaks, 19),
    (answer_a_query_and_accept_the_commit_later, 1890),
    (admit_before_the_last_blocks, 4),
    (answer_a_query_and_wait_for_the_last_blocks, 44),
    (forget_a_commit, 329),
    (ignore_an_abort_during_the_commit, 42),
    (close_a_migration_that_was_aborted, 42),
    (give_back_blocks_that_are_being_written, 0),
    (believe_that_doubled_blocks_are_new, 203),
    (leak_an_expired_reservation, 0),
    (copy_blocks_that_are_being_written, 4),
    (leave_the_generator_behind, 4),
)


@pytest.mark.parametrize(
    ("mistake", "seed"), MISTAKES, ids=[mistake.__name__ for mistake, _ in MISTAKES]
)
def test_a_mistake_is_noticed(
    mistake: Callable[[pytest.MonkeyPatch], None], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    # ValueError: a stage that is not as long as its blocks.
    with pytest.raises((AssertionError, IllegalTransition, ValueError)):
        run_worlds([seed, *range(6_000)])
