"""Scale-up relieves those that wait: what holds no KV goes to a newcomer at once, in bulk."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from llumsched.core.actions import Action, StartMigration
from llumsched.core.events import InstanceJoined, MigrationFinished, MigrationOutcome
from llumsched.core.policy import PolicyBundle
from llumsched.policies.freeness import Freeness
from llumsched.policies.freeness_pairs import FreenessPairs
from tests.core.builders import TOTAL_BLOCKS, Driver, make_spec

MIGRATES = PolicyBundle(name="test", dispatch=Freeness(), migration=FreenessPairs())


def crowded(bundle: PolicyBundle = MIGRATES, **options: Any) -> Driver:
    """One instance with 3 requests that run and 20 that wait, 4 blocks of prompt each."""
    driver = Driver(bundle, **options)
    driver.join("a")
    ids = [f"r{i:02}" for i in range(23)]
    for request_id in ids:
        driver.arrive(request_id, num_blocks=4)
    driver.report(
        "a", num_used_blocks=98, num_running=3, num_waiting=20, received_request_ids=tuple(ids)
    )
    return driver


def joined(driver: Driver, instance_id: str = "b") -> list[StartMigration]:
    actions: tuple[Action, ...] = driver.handle(InstanceJoined(spec=make_spec(instance_id)))
    return [action for action in actions if isinstance(action, StartMigration)]


def test_a_newcomer_takes_those_that_wait_longest_up_to_half_of_its_blocks() -> None:
    moves = joined(crowded())
    # The head of the queue (r03) is next where it is.
    assert [move.request_id for move in moves] == [f"r{i:02}" for i in range(4, 16)]
    assert len(moves) * 4 <= TOTAL_BLOCKS / 2
    assert {(move.source, move.destination) for move in moves} == {("a", "b")}


def test_of_a_long_queue_it_takes_its_share_of_old_and_new_alike() -> None:
    driver = Driver(MIGRATES)
    driver.join("a", "b")
    for i in range(100):
        driver.arrive(f"r{i:02}", num_blocks=8)
    for instance_id in ("a", "b"):
        ids = tuple(r.request.request_id for r in driver.scheduler._ledger.on(instance_id))
        driver.report(
            instance_id, num_used_blocks=99, num_waiting=len(ids) - 10, received_request_ids=ids
        )
    moves = joined(driver, "c")
    assert len(moves) == pytest.approx(78 / 3, abs=1)
    # Evenly spread over those that wait, in the order of their arrival.
    numbers = [int(str(move.request_id)[1:]) for move in moves]
    assert numbers == sorted(numbers)
    assert max(b - a for a, b in itertools.pairwise(numbers)) <= 8
    assert {move.source for move in moves} == {"a", "b"}


def test_it_needs_no_slots_and_leaves_them_to_what_has_kv() -> None:
    driver = crowded(max_migrations_out=1, max_migrations_in=1)
    assert len(joined(driver)) > 1
    columns = driver.cluster.columns
    assert columns.num_migrations_out.tolist() == [0, 0]
    assert columns.num_migrations_in.tolist() == [0, 0]


def test_a_second_newcomer_takes_others() -> None:
    driver = crowded()
    first = {move.request_id for move in joined(driver, "b")}
    second = {move.request_id for move in joined(driver, "c")}
    assert second
    assert not first & second


def test_who_has_moved_is_on_the_newcomer_and_who_was_refused_where_it_was() -> None:
    driver = crowded()
    taken, refused, *_ = joined(driver)
    for move, outcome in (
        (taken, MigrationOutcome.COMMITTED),
        (refused, MigrationOutcome.REFUSED),
    ):
        driver.handle(
            MigrationFinished(
                migration_id=move.migration_id,
                request_id=move.request_id,
                source="a",
                destination="b",
                outcome=outcome,
            )
        )
    assert driver.scheduler.request_instance(str(taken.request_id)) == "b"
    assert driver.scheduler.request_instance(str(refused.request_id)) == "a"


def test_without_a_migration_policy_or_where_it_is_switched_off_nothing_moves() -> None:
    assert not joined(crowded(PolicyBundle(name="test", dispatch=Freeness())))
    assert not joined(crowded(relieve_waiting=False))
