"""Columns of costs: derived when a policy reads one, and then what the present load makes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llumsched.core.events import InstanceLost
from llumsched.core.policy import Placement, PolicyBundle
from llumsched.core.scheduling.cluster_state import Cluster
from llumsched.core.snapshot import COSTS, TERMS, ClusterSnapshot
from llumsched.core.types import SchedulingRequest
from llumsched.policies.freeness import Freeness
from tests.core.builders import Driver

BUSY = {"num_used_blocks": 60, "num_running": 6, "step_time_s": 0.05}
QUIET = {"num_used_blocks": 10, "num_running": 2, "num_prefill_tokens_pending": 700}


class CheapestBlock:
    """Reads a cost at every dispatch, as `adaptive` does."""

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        row = cluster.argmin(cluster.columns.block_price_s, cluster.candidates(request))
        return None if row is None else Placement(instance_id=cluster.instance_ids[row], reason="")


def day(policy: Any) -> Driver:
    """Joins, reports, arrivals, a loss and a newcomer: every way in which a row changes."""
    driver = Driver(PolicyBundle(name="test", dispatch=policy))
    for instance_id in "abc":
        driver.join(instance_id)
    driver.report("a", **BUSY)
    driver.report("c", **QUIET)
    for number in range(4):
        driver.arrive(f"r{number}", num_blocks=3)
    driver.handle(InstanceLost(instance_id="b"))
    driver.join("d")
    driver.now += 0.5
    driver.report("c", **BUSY)
    return driver


@pytest.fixture
def num_derived(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    derived: list[str] = []
    publish = Cluster._publish_costs

    def counted(self: Cluster, record: Any, row: int, cells: Any) -> None:
        derived.append(record.spec.instance_id)
        publish(self, record, row, cells)

    monkeypatch.setattr(Cluster, "_publish_costs", counted)
    return derived


def test_no_cost_is_derived_for_a_policy_that_reads_none(num_derived: list[str]) -> None:
    day(Freeness())
    assert num_derived == []


def test_to_copy_the_view_is_not_to_read_it(num_derived: list[str]) -> None:
    driver = Driver(PolicyBundle(name="test", dispatch=Freeness()))
    assert len(driver.cluster) == 0
    driver.join("a")
    driver.report("a", **BUSY)
    assert driver.cluster.columns.decode_step_s[0] == 0.05
    num_derived.clear()
    driver.report("a", **QUIET)
    driver.arrive("r")
    assert num_derived == []


def test_costs_are_the_same_whether_they_are_read_at_every_event_or_once() -> None:
    class FreenessThatLooks(Freeness):
        def dispatch(
            self, request: SchedulingRequest, cluster: ClusterSnapshot
        ) -> Placement | None:
            assert all(len(getattr(cluster.columns, name)) == len(cluster) for name in COSTS)
            return super().dispatch(request, cluster)

    once, always = day(Freeness()).cluster, day(FreenessThatLooks()).cluster
    assert once.instance_ids == always.instance_ids == ("a", "c", "d")
    for name in COSTS:
        np.testing.assert_array_equal(getattr(once.columns, name), getattr(always.columns, name))


def test_a_decision_sees_the_costs_of_what_was_sent_before_it() -> None:
    driver = Driver(PolicyBundle(name="test", dispatch=CheapestBlock()))
    for instance_id in "ab":
        driver.join(instance_id)
        driver.report(instance_id, num_used_blocks=60, num_running=6, step_time_s=0.2)
    placed = []
    for number in range(4):
        driver.arrive(f"r{number}", num_blocks=10)
        placed.append(driver.scheduler.request_instance(f"r{number}"))
    assert placed == ["a", "b", "a", "b"]


def test_only_rows_that_changed_are_derived_again(num_derived: list[str]) -> None:
    driver = day(CheapestBlock())
    num_derived.clear()
    driver.report("a", **QUIET)
    driver.arrive("late", num_blocks=1)
    driver.arrive("later", num_blocks=1)
    placed = driver.scheduler.request_instance("late")
    assert num_derived == ["a", placed]


def test_a_column_that_is_not_there_is_an_error() -> None:
    columns = day(Freeness()).scheduler._cluster.snapshot.columns
    assert not hasattr(columns, "block_prize_s")


def test_a_weighted_sum_is_that_of_its_columns_and_ties_stay_ties() -> None:
    driver = Driver(PolicyBundle(name="test", dispatch=Freeness()))
    for number in range(19):
        driver.join(f"i{number:02}")
        driver.report(f"i{number:02}", **BUSY)
    columns = driver.scheduler._cluster.at(driver.now).columns
    weights = [1.1, 700.0, 0.3, 0.013, 0.7]
    expected = sum(w * getattr(columns, name) for w, name in zip(weights, TERMS, strict=True))
    found = columns.weighted(weights)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert len(set(found.tolist())) == 1
    np.testing.assert_allclose(columns.weighted(weights, np.array([3, 17])), found[[3, 17]])
