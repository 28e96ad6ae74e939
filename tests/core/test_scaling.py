"""Growing and shrinking: a wish must last, cool-downs hold, and an operator is obeyed at once."""

from __future__ import annotations

from typing import Any

import pytest

from llumsched.core.actions import (
    LaunchInstance,
    PolicyFailed,
    RejectRequest,
    TerminateInstance,
)
from llumsched.core.events import (
    InstanceJoined,
    InstanceLost,
    LaunchFailed,
    ScaleRequested,
    Ticked,
)
from llumsched.core.policy import PolicyBundle, ScaleDown, ScaleUp
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.policies.freeness import Freeness
from tests.core.builders import Driver, make_spec

UP = ScaleUp(num_instances=1, reason="full")


class Wish:
    """A scaling policy that wants what the test says."""

    def __init__(self, wish: Any = None) -> None:
        self.wish = wish

    def scale(self, cluster: ClusterSnapshot) -> Any:
        return self.wish


def make_driver(wish: Any = None, **options: Any) -> tuple[Driver, Wish]:
    policy = Wish(wish)
    bundle = PolicyBundle(name="test", dispatch=Freeness(), scaling=policy)
    limits = {"min_instances": 1, "max_instances": 4, "scale_up_after_s": 2.0} | options
    driver = Driver(bundle, **limits)
    driver.join("a", "b")
    return driver, policy


def tick(driver: Driver, by_s: float = 1.0) -> tuple[Any, ...]:
    driver.now += by_s
    for instance_id in ("a", "b"):
        if instance_id in driver.cluster:
            driver.report(instance_id)
    return driver.handle(Ticked())


def test_a_wish_to_grow_must_last() -> None:
    driver, policy = make_driver(UP)
    assert driver.scheduler.next_deadline() == 1.0
    assert tick(driver) == ()
    assert tick(driver) == ()
    policy.wish = None
    assert tick(driver) == ()
    policy.wish = UP
    assert [tick(driver), tick(driver)] == [(), ()]
    (action,) = tick(driver)
    assert action == LaunchInstance(launch_id="l1", reason="full")
    assert driver.cluster.num_booting == 1


def test_after_growing_there_is_a_pause() -> None:
    driver, _ = make_driver(UP, scale_up_after_s=0.0, scale_up_cooldown_s=3.0)
    assert len(tick(driver)) == 1
    assert [len(tick(driver)) for _ in range(3)] == [0, 0, 1]


def test_growth_stops_at_the_maximum_with_booting_instances_counted() -> None:
    driver, _ = make_driver(
        ScaleUp(num_instances=9, reason="full"), scale_up_after_s=0.0, scale_up_cooldown_s=0.0
    )
    assert len(tick(driver)) == 2
    assert tick(driver) == ()


def test_an_instance_that_joins_ends_its_launch() -> None:
    driver, _ = make_driver(UP, scale_up_after_s=0.0)
    (action,) = tick(driver)
    driver.handle(InstanceJoined(spec=make_spec("c"), launch_id=action.launch_id))
    assert driver.cluster.num_booting == 0
    assert len(driver.cluster) == 3


@pytest.mark.parametrize("how", ["told", "never answered"])
def test_a_launch_that_fails_is_tried_again(how: str) -> None:
    driver, _ = make_driver(UP, scale_up_after_s=0.0, boot_timeout_s=50.0, max_instances=3)
    (action,) = tick(driver)
    if how == "told":
        driver.handle(LaunchFailed(launch_id=action.launch_id, reason="no machine"))
    else:
        assert tick(driver, by_s=20.0) == ()
        driver.now += 29.0
    assert len(tick(driver)) == 1


def test_a_wish_to_shrink_drains_the_named_instance_after_its_cooldown() -> None:
    driver, policy = make_driver(
        None, scale_down_after_s=2.0, scale_down_cooldown_s=5.0, max_instances=3
    )
    driver.join("c")
    policy.wish = ScaleDown(instance_id="c", reason="idle")
    assert [tick(driver), tick(driver)] == [(), ()]
    (action,) = tick(driver)
    assert action == TerminateInstance(instance_id="c", reason="drained")
    driver.handle(InstanceLost(instance_id="c"))
    policy.wish = ScaleDown(instance_id="b", reason="idle")
    assert [len(tick(driver)) for _ in range(5)] == [0, 0, 0, 0, 1]


def test_shrinking_stops_at_the_minimum_and_waits_for_what_boots() -> None:
    driver, policy = make_driver(
        ScaleDown(instance_id="b", reason="idle"), scale_down_after_s=0.0, min_instances=2
    )
    assert tick(driver) == ()
    driver, policy = make_driver(UP, scale_up_after_s=0.0, scale_down_after_s=0.0)
    tick(driver)
    policy.wish = ScaleDown(instance_id="b", reason="idle")
    assert tick(driver, by_s=100.0) == ()


def test_instances_that_are_lost_are_replaced_up_to_the_minimum() -> None:
    driver, _ = make_driver(None, min_instances=2)
    driver.handle(InstanceLost(instance_id="a"))
    (action,) = tick(driver)
    assert isinstance(action, LaunchInstance)
    assert tick(driver) == ()


def test_a_request_held_by_an_empty_cluster_wakes_scaling() -> None:
    bundle = PolicyBundle(name="test", dispatch=Freeness(), scaling=Wish(UP))
    driver = Driver(bundle, min_instances=0, max_instances=1, scale_up_after_s=0.0)
    assert driver.scheduler.next_deadline() is None
    driver.arrive("r")
    driver.now = 1.0
    assert driver.scheduler.next_deadline() == 1.0
    assert driver.handle(Ticked()) == (LaunchInstance(launch_id="l1", reason="full"),)
    driver.now = 100.0
    assert isinstance(driver.handle(Ticked())[0], RejectRequest)


def test_scaling_is_off_without_a_maximum() -> None:
    driver, _ = make_driver(UP, max_instances=0, scale_up_after_s=0.0)
    assert tick(driver) == ()
    assert driver.scheduler.next_deadline() is None


def test_an_operator_is_obeyed_at_once_also_with_scaling_off() -> None:
    driver, _ = make_driver(None, max_instances=0)
    driver.report("a", num_used_blocks=5)
    actions = driver.handle(ScaleRequested(num_instances=4))
    assert [type(a) for a in actions] == [LaunchInstance, LaunchInstance]
    assert driver.handle(ScaleRequested(num_instances=4)) == ()
    (action,) = driver.handle(ScaleRequested(num_instances=3))
    assert action == TerminateInstance(instance_id="b", reason="drained")


@pytest.mark.parametrize(
    ("wish", "error"),
    [
        (3, "answered 3, not ScaleUp or ScaleDown"),
        (ScaleDown(instance_id="zz", reason=""), "'zz', which is not a serving instance"),
        (ScaleUp(num_instances="2", reason=""), "whose num_instances is '2'"),  # type: ignore[arg-type]
    ],
)
def test_nonsense_is_reported_and_nothing_scales(wish: Any, error: str) -> None:
    driver, _ = make_driver(wish, scale_up_after_s=0.0)
    (failed,) = tick(driver)
    assert isinstance(failed, PolicyFailed)
    assert error in failed.error


def test_a_policy_that_raises_is_reported() -> None:
    driver, policy = make_driver()
    policy.scale = lambda cluster: 1 / 0  # type: ignore[method-assign]
    (failed,) = tick(driver)
    assert "ZeroDivisionError" in failed.error
