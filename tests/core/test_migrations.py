"""Which migrations start, and what the ledger learns when they end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from llumsched.core.actions import (
    DispatchRequest,
    PolicyFailed,
    RefuseMigration,
    StartMigration,
    TerminateInstance,
)
from llumsched.core.events import (
    DrainRequested,
    InstanceLost,
    MigrationFinished,
    MigrationOutcome,
    MigrationRequested,
    RequestFinished,
    Ticked,
)
from llumsched.core.policy import MigrationPair, PolicyBundle
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.policies.freeness import Freeness
from llumsched.policies.freeness_pairs import FreenessPairs
from tests.core.builders import TOTAL_BLOCKS, Driver


class Pairs:
    """A migration policy that proposes what the test says."""

    def __init__(self, *pairs: Any) -> None:
        self.pairs: Iterable[Any] = pairs

    def rebalance(self, cluster: ClusterSnapshot) -> Iterable[Any]:
        return self.pairs


def pair(source: str, destination: str, **changes: Any) -> MigrationPair:
    return MigrationPair(source=source, destination=destination, reason="test", **changes)


def make_driver(*pairs: Any, **options: Any) -> Driver:
    """Instance a is loaded, b is nearly empty, and the policy proposes these pairs."""
    bundle = PolicyBundle(name="test", dispatch=Freeness(), migration=Pairs(*pairs))
    driver = Driver(bundle, **options)
    driver.join("a", "b")
    loaded(driver)
    return driver


def loaded(driver: Driver) -> None:
    driver.report("a", num_used_blocks=80, num_running=8)
    driver.report("b", num_used_blocks=10, num_running=1)


def tick(driver: Driver, by_s: float = 0.5) -> tuple[Any, ...]:
    driver.now += by_s
    loaded(driver)
    return driver.handle(Ticked())


def finish(
    driver: Driver,
    action: StartMigration,
    outcome: MigrationOutcome = MigrationOutcome.COMMITTED,
    request_id: str | None = None,
) -> tuple[Any, ...]:
    return driver.handle(
        MigrationFinished(
            migration_id=action.migration_id,
            request_id=request_id,
            source=action.source,
            destination=action.destination,
            outcome=outcome,
        )
    )


# Arbitration of what a policy proposes.


def test_a_proposed_pair_starts_and_the_source_picks_the_request() -> None:
    driver = make_driver(pair("a", "b"))
    assert driver.scheduler.next_deadline() == 0.5
    (action,) = tick(driver)
    assert action == StartMigration(
        migration_id="m1",
        source="a",
        destination="b",
        request_id=None,
        reason="test",
        settle_s=5.0,
    )


def test_an_expected_migration_is_overlaid_until_its_reservation_is_reported() -> None:
    driver = make_driver(pair("a", "b"))
    tick(driver)
    assert driver.cluster["b"].num_free_blocks == TOTAL_BLOCKS - 10 - 10  # the mean of a's eight
    driver.report("b", num_used_blocks=25, num_reserved_blocks=15, num_migrations_in=1)
    assert driver.cluster["b"].num_free_blocks == TOTAL_BLOCKS - 25


@pytest.mark.parametrize("slot", ["max_migrations_in", "max_migrations_out"])
def test_no_more_migrations_start_than_there_are_slots(slot: str) -> None:
    driver = make_driver(pair("a", "b", num_requests=5), **{slot: 2})
    started = tick(driver)
    assert len(started) == 2
    assert tick(driver) == ()
    finish(driver, started[0], MigrationOutcome.ABORTED)
    assert len(tick(driver)) == 1


def test_a_decision_starts_a_bounded_number() -> None:
    driver = make_driver(
        pair("a", "b", num_requests=5),
        max_migrations_in=9,
        max_migrations_out=9,
        max_migrations_per_decision=3,
    )
    assert len(tick(driver)) == 3


def test_a_move_that_would_only_swap_the_roles_is_refused() -> None:
    driver = make_driver(pair("a", "b"))
    driver.now = 0.5
    driver.report("a", num_used_blocks=90, num_running=1)
    driver.report("b", num_used_blocks=10, num_running=1)
    assert driver.handle(Ticked()) == ()
    # Unless balance is not the aim.
    driver.scheduler.bundle.migration.pairs = [pair("a", "b", balances=False)]  # type: ignore[union-attr]
    driver.now = 1.0
    assert len(driver.handle(Ticked())) == 1


def test_load_that_has_just_moved_does_not_come_back() -> None:
    driver = make_driver(pair("a", "b"), migration_settle_s=5.0, stale_after_s=100)
    (action,) = tick(driver)
    finish(driver, action, request_id="r")
    driver.scheduler.bundle.migration.pairs = [pair("b", "a")]  # type: ignore[union-attr]
    for by_s, num_started in ((0.5, 0), (4.0, 0), (1.0, 1)):
        driver.now += by_s
        driver.report("b", num_used_blocks=80, num_running=8)
        driver.report("a", num_used_blocks=10, num_running=1)
        assert len(driver.handle(Ticked())) == num_started


@pytest.mark.parametrize("busy", [("b", "a"), ("c", "a"), ("b", "c")])
def test_an_instance_does_not_give_and_take_at_once(busy: tuple[str, str]) -> None:
    driver = make_driver(pair(*busy, balances=False), stale_after_s=100)
    driver.join("c")
    driver.report("c", num_used_blocks=10, num_running=1)
    assert len(tick(driver)) == 1
    driver.scheduler.bundle.migration.pairs = [pair("a", "b")]  # type: ignore[union-attr]
    assert tick(driver) == ()
    driver.scheduler.bundle.migration.pairs = [pair("a", "b", balances=False)]  # type: ignore[union-attr]
    # Where balance is not the aim it may, but never both ways between the same two.
    assert len(tick(driver)) == (0 if busy == ("b", "a") else 1)


def test_a_source_with_nothing_to_move_is_left_alone_for_a_while() -> None:
    driver = make_driver(pair("a", "b"), migration_settle_s=5.0)
    (action,) = tick(driver)
    finish(driver, action, MigrationOutcome.NOTHING_TO_MOVE)
    assert tick(driver) == ()
    assert len(tick(driver, by_s=5.0)) == 1


def test_a_silent_instance_takes_no_part() -> None:
    driver = make_driver(pair("a", "b"), stale_after_s=1.0)
    driver.now = 2.0
    driver.report("a", num_used_blocks=80, num_running=8)
    assert driver.handle(Ticked()) == ()


def test_a_migration_whose_end_is_not_told_gives_its_slots_back() -> None:
    driver = make_driver(pair("a", "b"), max_migrations_out=1, migration_timeout_s=10.0)
    tick(driver)
    assert tick(driver, by_s=5.0) == ()
    assert len(tick(driver, by_s=6.0)) == 1


def explode() -> Iterable[MigrationPair]:
    yield pair("a", "b")
    raise RuntimeError("broken")


@pytest.mark.parametrize(
    ("proposal", "error"),
    [
        (3, "answered 3, not MigrationPair"),
        (pair("a", "zz"), "unknown instance 'zz'"),
        (pair("a", "a"), "from 'a' to itself"),
        (pair("a", "d"), "'d' as destination, which is draining"),
        (pair("a", "b", num_requests=0), "to move 0 requests"),
        (pair("a", ["b"]), "whose destination is ['b']"),  # type: ignore[arg-type]
    ],
)
def test_nonsense_is_reported_and_the_other_pairs_still_start(proposal: Any, error: str) -> None:
    driver = make_driver(proposal, pair("a", "b"))
    driver.join("d")
    driver.report("d", num_used_blocks=1)
    driver.handle(DrainRequested(instance_id="d"))
    failed, started = tick(driver)
    assert isinstance(failed, PolicyFailed)
    assert error in failed.error
    assert isinstance(started, StartMigration)


def test_a_pair_proposed_twice_is_reported() -> None:
    _, failed = tick(make_driver(pair("a", "b"), pair("a", "b")))
    assert failed.error == "proposed 'a' to 'b' twice"


@pytest.mark.parametrize(
    "rebalance", [lambda cluster: explode(), lambda cluster: None, lambda cluster: 1 / 0]
)
def test_a_migration_policy_that_raises_does_not_stop_the_scheduler(
    rebalance: Callable[[ClusterSnapshot], Any],
) -> None:
    driver = make_driver()
    driver.scheduler.bundle.migration.rebalance = rebalance  # type: ignore[union-attr, method-assign]
    assert isinstance(tick(driver)[-1], PolicyFailed)
    assert driver.scheduler.next_deadline() == 1.0


def test_a_policy_that_yields_for_ever_is_cut_off() -> None:
    driver = make_driver()
    driver.scheduler.bundle.migration.pairs = iter(lambda: 0, 1)  # type: ignore[union-attr]
    assert len(tick(driver)) == 4 * 2


# The end of a migration.


def migrating(driver: Driver) -> StartMigration:
    """Request r, on a, starts to move to b."""
    driver.arrive("r", num_blocks=10)
    assert driver.scheduler.request_instance("r") == "b"
    driver.report("b", num_used_blocks=10, received_request_ids=("r",))
    (action,) = driver.handle(MigrationRequested(request_id="r", destination="a"))
    assert isinstance(action, StartMigration)
    return action


def test_a_committed_request_is_on_the_destination() -> None:
    driver = make_driver()
    action = migrating(driver)
    finish(driver, action, request_id="r")
    assert driver.scheduler.request_instance("r") == "a"
    assert driver.cluster["a"].num_free_blocks == TOTAL_BLOCKS - 80 - 10
    driver.report("a", num_used_blocks=90, num_running=9, received_request_ids=("r",))
    assert driver.cluster["a"].num_free_blocks == TOTAL_BLOCKS - 90


@pytest.mark.parametrize("outcome", [MigrationOutcome.ABORTED, MigrationOutcome.REFUSED])
def test_a_request_that_did_not_move_is_where_it_was(outcome: MigrationOutcome) -> None:
    driver = make_driver()
    action = migrating(driver)
    finish(driver, action, outcome, request_id="r")
    assert driver.scheduler.request_instance("r") == "b"
    assert driver.cluster["a"].num_free_blocks == TOTAL_BLOCKS - 80


def test_a_report_of_the_destination_may_overtake_the_end() -> None:
    driver = make_driver()
    action = migrating(driver)
    driver.report("a", num_used_blocks=90, num_running=9, received_request_ids=("r",))
    assert driver.scheduler.request_instance("r") == "a"
    driver.report("a", num_used_blocks=80, num_running=8, finished_request_ids=("r",))
    finish(driver, action, request_id="r")
    assert driver.scheduler.request_instance("r") is None


def test_what_a_report_has_named_is_not_expected_twice() -> None:
    driver = make_driver(migration_timeout_s=1.0)
    action = migrating(driver)
    driver.report("a", num_used_blocks=90, num_running=9, received_request_ids=("r",))
    assert driver.cluster["a"].num_free_blocks == TOTAL_BLOCKS - 90
    finish(driver, action, request_id="r")
    assert driver.cluster["a"].num_free_blocks == TOTAL_BLOCKS - 90
    # The same when the end comes after the migration was given up.
    (back,) = driver.handle(MigrationRequested(request_id="r", destination="b"))
    assert isinstance(back, StartMigration)
    driver.now += 2.0
    loaded(driver)
    driver.handle(Ticked())
    driver.report("b", num_used_blocks=20, num_running=2, received_request_ids=("r",))
    finish(driver, back, request_id="r")
    assert driver.scheduler.request_instance("r") == "b"
    assert driver.cluster["b"].num_free_blocks == TOTAL_BLOCKS - 20


def test_a_request_that_ends_while_it_moves_leaves_nothing() -> None:
    driver = make_driver()
    action = migrating(driver)
    driver.handle(RequestFinished(request_id="r"))
    finish(driver, action, request_id="r")
    assert driver.scheduler.num_requests == 0
    assert driver.cluster["a"].num_free_blocks == TOTAL_BLOCKS - 80


def test_a_late_commit_of_a_migration_given_up_still_moves_the_request() -> None:
    driver = make_driver(migration_timeout_s=1.0)
    action = migrating(driver)
    tick(driver, by_s=2.0)
    finish(driver, action, request_id="r")
    assert driver.scheduler.request_instance("r") == "a"


def test_a_lost_source_ends_its_migrations_and_its_requests_are_dispatched_again() -> None:
    driver = make_driver()
    migrating(driver)
    (action,) = driver.handle(InstanceLost(instance_id="b"))
    assert isinstance(action, DispatchRequest)
    assert action.instance_id == "a"
    assert driver.cluster["a"].num_migrations_in == 0


def test_a_lost_destination_frees_the_source() -> None:
    driver = make_driver()
    migrating(driver)
    assert driver.handle(InstanceLost(instance_id="a")) == ()
    assert driver.scheduler.request_instance("r") == "b"
    assert driver.cluster["b"].num_migrations_out == 0


# What an operator asks for.


def refusal(driver: Driver, request_id: str, destination: str | None = None) -> str:
    (action,) = driver.handle(MigrationRequested(request_id=request_id, destination=destination))
    assert isinstance(action, RefuseMigration)
    assert action.request_id == request_id
    return action.reason


def test_an_operator_moves_a_request_there_and_back() -> None:
    driver = make_driver()
    finish(driver, migrating(driver), request_id="r")
    (action,) = driver.handle(MigrationRequested(request_id="r"))
    assert isinstance(action, StartMigration)
    assert (action.source, action.destination, action.request_id) == ("a", "b", "r")


def test_what_an_operator_asks_for_is_refused_with_a_reason() -> None:
    driver = make_driver(max_migrations_in=1)
    driver.join("d")
    driver.report("d", num_used_blocks=90, num_running=1)
    driver.handle(DrainRequested(instance_id="d"))
    driver.arrive("r", num_blocks=10)
    driver.arrive("r2", num_blocks=10)
    assert refusal(driver, "zz") == "unknown request 'zz': it never arrived, or has ended"
    assert refusal(driver, "r", "zz") == "unknown destination 'zz'; instances: a, b, d"
    assert refusal(driver, "r", "b") == "destination equals source (b)"
    assert refusal(driver, "r", "d") == "destination d is draining"
    driver.handle(MigrationRequested(request_id="r", destination="a"))
    assert refusal(driver, "r", "a") == "request 'r' is already migrating to a"
    assert "a already receives 1 migration(s), its limit" in refusal(driver, "r2", "a")
    assert refusal(driver, "r2") == "no other instance can receive a migration now"
    driver.now = 50.0
    driver.report("b", num_used_blocks=10)
    assert "destination a is stale: it has not reported for 50.0 s" in refusal(driver, "r2", "a")


def test_a_queued_request_cannot_migrate() -> None:
    driver = Driver()
    driver.arrive("r")
    assert refusal(driver, "r") == "request 'r' is still queued; it is on no instance"


# Draining.


def test_a_draining_instance_is_emptied_and_leaves() -> None:
    bundle = PolicyBundle(name="test", dispatch=Freeness(), migration=FreenessPairs())
    driver = Driver(bundle)
    driver.join("a", "b")
    driver.report("b", num_used_blocks=50, num_running=1)
    driver.arrive("r")
    driver.report("a", num_used_blocks=1, received_request_ids=("r",))
    assert driver.handle(DrainRequested(instance_id="a")) == ()
    driver.now = 0.5
    (action,) = driver.handle(Ticked())
    assert isinstance(action, StartMigration)
    finish(driver, action, request_id="r")
    (action,) = driver.report("a")
    assert action == TerminateInstance(instance_id="a", reason="drained")
    assert driver.cluster["a"].state == "gone"
    assert driver.handle(InstanceLost(instance_id="a")) == ()


def test_an_idle_instance_leaves_at_once() -> None:
    driver = Driver()
    driver.join("a")
    (action,) = driver.handle(DrainRequested(instance_id="a"))
    assert isinstance(action, TerminateInstance)
    assert driver.handle(DrainRequested(instance_id="a")) == ()


def test_a_drain_ends_at_its_deadline() -> None:
    driver = Driver(drain_timeout_s=100.0)
    driver.join("a", "b")
    driver.arrive("r")
    driver.handle(DrainRequested(instance_id="a"))
    assert driver.scheduler.next_deadline() == 100.0
    driver.handle(DrainRequested(instance_id="a", deadline_s=7.0))
    assert driver.scheduler.next_deadline() == 7.0
    driver.now = 7.0
    driver.report("b", num_used_blocks=1)
    (action,) = driver.handle(Ticked())
    assert action == TerminateInstance(
        instance_id="a", reason="drain deadline passed, requests left: 1"
    )
    (action,) = driver.handle(InstanceLost(instance_id="a"))
    assert isinstance(action, DispatchRequest)
    assert action.instance_id == "b"
