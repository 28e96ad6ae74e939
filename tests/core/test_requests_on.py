"""Requests one by one: what a policy sees of them, names of them, and plans for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from llumsched.core.actions import DispatchRequest, PolicyFailed, StartMigration
from llumsched.core.events import (
    InstanceLost,
    MigrationFinished,
    MigrationOutcome,
    RequestFinished,
    Ticked,
)
from llumsched.core.policy import MigrationPair, Placement, PolicyBundle
from llumsched.core.scheduling.scheduler import GlobalScheduler
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.core.types import SchedulingRequest
from tests.core.builders import BLOCK_SIZE, Driver

BUSY = {"num_used_blocks": 20, "num_running": 2}


class ToA:
    """Everything goes to `a`; a request named `planned…` is to go on to `b` after 5 tokens."""

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement:
        if request.request_id.startswith("planned"):
            return Placement(instance_id="a", reason="", hand_over_to="b", after_output_tokens=5)
        return Placement(instance_id="a", reason="")


class MoveNamed:
    """Moves the request with the most output from `a` to `b`."""

    def rebalance(self, cluster: ClusterSnapshot) -> Iterable[MigrationPair]:
        requests = cluster.requests_on("a")
        if requests.is_decoding.any():
            row = int((requests.num_output_tokens * requests.is_decoding).argmax())
            yield MigrationPair(
                source="a",
                destination="b",
                reason="the longest answer",
                request_id=requests.requests[row].request_id,
            )


class Nothing:
    def rebalance(self, cluster: ClusterSnapshot) -> Iterable[MigrationPair]:
        return ()


def make(migration: Any = None) -> Driver:
    bundle = PolicyBundle(name="test", dispatch=ToA(), migration=migration or Nothing())
    driver = Driver(bundle, follow_requests=True, migration_interval_s=1.0)
    for instance_id in "ab":
        driver.join(instance_id)
        driver.report(instance_id)
    return driver


def tick(driver: Driver) -> list[tuple[str, str | None, str]]:
    driver.now += 1.0
    driver.report("b")
    actions = driver.handle(Ticked())
    assert not [a for a in actions if isinstance(a, PolicyFailed)]
    return [
        (a.source, a.request_id, a.destination) for a in actions if isinstance(a, StartMigration)
    ]


def test_the_view_counts_on_from_what_was_told_by_the_steps_since() -> None:
    driver = make()
    driver.arrive("r1", num_blocks=2, tpot_slo_s=0.1)
    driver.arrive("r2", num_blocks=4)
    driver.report("a", **BUSY, num_decode_steps=100, progress=(("r1", 34, 3), ("r2", 16, 0)))
    driver.now += 2.0
    driver.report("a", **BUSY, num_decode_steps=107, progress=())
    seen = driver.cluster.requests_on("a")
    assert [r.request_id for r in seen.requests] == ["r1", "r2"]
    # What is still in its prompt does not come on with decode steps.
    assert seen.num_output_tokens.tolist() == [10, 0]
    assert seen.num_computed_tokens.tolist() == [41, 16]
    assert seen.is_decoding.tolist() == [True, False]
    assert seen.num_prompt_tokens.tolist() == [2 * BLOCK_SIZE, 4 * BLOCK_SIZE]
    assert seen.since_placed_s.tolist() == [2.0, 2.0]
    assert seen.tpot_slo_s[0] == 0.1
    assert len(driver.cluster.requests_on("b")) == 0


def test_what_no_report_has_told_of_has_produced_nothing() -> None:
    driver = make()
    driver.arrive("r1", num_blocks=2)
    driver.report("a", **BUSY, num_decode_steps=100)
    seen = driver.cluster.requests_on("a")
    assert (seen.num_output_tokens[0], seen.is_decoding[0]) == (0, False)


def test_progress_of_requests_that_are_elsewhere_or_unknown_is_ignored() -> None:
    driver = make()
    driver.arrive("r1", num_blocks=2)
    driver.report("b", num_decode_steps=5, progress=(("r1", 34, 3), ("nobody", 1, 1)))
    assert driver.cluster.requests_on("a").num_output_tokens.tolist() == [0]


def test_a_request_that_moved_keeps_its_output_until_the_destination_tells_more() -> None:
    driver = make(MoveNamed())
    driver.arrive("r1", num_blocks=2)
    driver.report("a", **BUSY, num_decode_steps=100, progress=(("r1", 34, 3),))
    driver.report("a", **BUSY, num_decode_steps=104)
    assert tick(driver) == [("a", "r1", "b")]
    driver.handle(
        MigrationFinished(
            migration_id="m1",
            request_id="r1",
            source="a",
            destination="b",
            outcome=MigrationOutcome.COMMITTED,
        )
    )
    driver.report("b", **BUSY, num_decode_steps=9000)
    moved = driver.cluster.requests_on("b")
    assert (moved.num_output_tokens[0], moved.num_migrations[0]) == (7, 1)
    driver.report("b", **BUSY, num_decode_steps=9002, progress=(("r1", 40, 9),))
    driver.report("b", **BUSY, num_decode_steps=9003)
    assert driver.cluster.requests_on("b").num_output_tokens.tolist() == [10]


def test_a_policy_names_the_request_that_moves() -> None:
    driver = make(MoveNamed())
    for name in ("r1", "r2"):
        driver.arrive(name, num_blocks=2)
    progress = (("r1", 34, 3), ("r2", 50, 19))
    driver.report("a", **BUSY, num_decode_steps=100, progress=progress)
    assert tick(driver) == [("a", "r2", "b")]
    # It is under way: it is not asked for again.
    assert tick(driver) == []


def test_the_source_may_refuse_and_the_request_rests_before_it_is_named_again() -> None:
    driver = make(MoveNamed())
    driver.arrive("r1", num_blocks=2)
    driver.report("a", **BUSY, num_decode_steps=100, progress=(("r1", 34, 3),))
    assert len(tick(driver)) == 1
    refused = MigrationFinished(
        migration_id="m1",
        request_id="r1",
        source="a",
        destination="b",
        outcome=MigrationOutcome.REFUSED,
    )
    driver.handle(refused)
    driver.report("a", **BUSY, num_decode_steps=101)
    assert len(tick(driver)) == 1


def test_a_named_request_that_has_ended_is_no_failure_of_the_policy() -> None:
    class Stubborn(Nothing):
        def rebalance(self, cluster: ClusterSnapshot) -> Iterable[MigrationPair]:
            yield MigrationPair(source="a", destination="b", reason="", request_id="gone")

    driver = make(Stubborn())
    driver.report("a", **BUSY)
    assert tick(driver) == []


def test_a_planned_hand_over_begins_when_the_tokens_are_there() -> None:
    driver = make()
    placed = driver.arrive("planned", num_blocks=2)
    assert isinstance(placed[0], DispatchRequest)
    driver.report("a", **BUSY, num_decode_steps=10, progress=(("planned", 33, 2),))
    assert tick(driver) == []
    driver.report("a", **BUSY, num_decode_steps=13)
    assert tick(driver) == [("a", "planned", "b")]
    assert tick(driver) == []


def test_a_plan_is_forgotten_with_its_request() -> None:
    driver = make()
    driver.arrive("planned", num_blocks=2)
    driver.report("a", **BUSY, num_decode_steps=10, progress=(("planned", 33, 2),))
    driver.handle(RequestFinished(request_id="planned", num_output_tokens=3))
    assert not driver.scheduler._ledger.planned
    assert tick(driver) == []


def test_what_is_placed_again_after_a_loss_has_the_plan_of_its_new_placement() -> None:
    class OnceThenNone(ToA):
        def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement:
            if "a" in cluster.rows:
                return super().dispatch(request, cluster)
            return Placement(instance_id="b", reason="")

    bundle = PolicyBundle(name="test", dispatch=OnceThenNone(), migration=Nothing())
    driver = Driver(bundle, follow_requests=True)
    driver.join("a", "b")
    driver.arrive("planned", num_blocks=2)
    assert list(driver.scheduler._ledger.planned) == ["planned"]
    driver.handle(InstanceLost(instance_id="a"))
    assert driver.scheduler.request_instance("planned") == "b"
    assert not driver.scheduler._ledger.planned


def test_a_plan_for_an_unknown_instance_is_a_failure_of_the_policy() -> None:
    class Lost(ToA):
        def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement:
            return Placement(instance_id="a", reason="", hand_over_to="z")

    driver = Driver(PolicyBundle(name="test", dispatch=Lost()))
    driver.join("a")
    failed = [a for a in driver.arrive("r") if isinstance(a, PolicyFailed)]
    assert failed[0].error == "plans to hand over to unknown instance 'z'"


@pytest.mark.parametrize("steps", [13, 11])
def test_plans_and_progress_survive_a_checkpoint(steps: int) -> None:
    driver = make()
    driver.arrive("planned", num_blocks=2)
    driver.report("a", **BUSY, num_decode_steps=10, progress=(("planned", 33, 2),))
    state = driver.scheduler.checkpoint()
    again = GlobalScheduler(driver.scheduler.bundle, driver.scheduler.options)
    again.restore(state)
    driver.scheduler = again
    driver.report("a", **BUSY, num_decode_steps=steps)
    assert tick(driver) == ([("a", "planned", "b")] if steps == 13 else [])
