"""Growing and shrinking: a wish must last, cool-downs hold, and an operator is obeyed at once."""

from __future__ import annotations

from typing import Any

import pytest

from llumsched.core.actions import (
    DispatchRequest,
    LaunchInstance,
    PolicyFailed,
    RejectRequest,
    TerminateInstance,
)
from llumsched.core.events import (
    DrainRequested,
    InstanceJoined,
    InstanceLost,
    LaunchFailed,
    ReplacementsCounted,
    RequestFinished,
    ScaleRequested,
    Ticked,
)
from llumsched.core.options import SchedulerOptions
from llumsched.core.params import ParamError
from llumsched.core.policy import Placement, PolicyBundle, ScaleDown, ScaleUp
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.core.types import InstanceState, SchedulingRequest
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


# From zero, and to it.


def make_empty(wish: Any = None, **options: Any) -> tuple[Driver, Wish]:
    policy = Wish(wish)
    bundle = PolicyBundle(name="test", dispatch=Freeness(), scaling=policy)
    return Driver(bundle, **{"min_instances": 0, "max_instances": 2} | options), policy


def launches(actions: tuple[Any, ...]) -> list[str]:
    return [action.launch_id for action in actions if isinstance(action, LaunchInstance)]


def test_a_request_that_finds_no_instance_has_one_launched_at_once() -> None:
    """No wish has to last, no pause to pass, and one will do."""
    driver, _ = make_empty(scale_up_after_s=100.0)
    assert driver.scheduler.next_deadline() is None
    (action,) = driver.arrive("r1")
    assert action == LaunchInstance(launch_id="l1", reason="no instance serves what is held")
    assert driver.arrive("r2") == ()
    joined = driver.handle(InstanceJoined(spec=make_spec("a"), launch_id="l1"))
    assert [(a.request_id, a.instance_id) for a in joined] == [("r1", "a"), ("r2", "a")]  # type: ignore[union-attr]


def test_without_a_scaling_policy_too() -> None:
    bundle = PolicyBundle(name="test", dispatch=Freeness())
    driver = Driver(bundle, min_instances=0, max_instances=1)
    assert launches(driver.arrive("r")) == ["l1"]


def test_nothing_is_launched_for_what_is_held_beside_an_instance() -> None:
    driver, _ = make_empty()
    driver.join("a")
    assert driver.arrive("r", num_blocks=1)
    driver.handle(DrainRequested(instance_id="a"))
    assert launches(driver.arrive("late")) == ["l1"], "one that drains takes nothing"
    driver, _ = make_empty(max_waiting_per_instance=1)
    driver.join("a")
    driver.report("a", num_used_blocks=90, num_waiting=1)
    assert driver.arrive("r") == ()


def test_when_the_last_instance_dies_another_is_launched_for_what_it_ran() -> None:
    driver, _ = make_empty()
    driver.join("a")
    driver.arrive("r")
    assert launches(driver.handle(InstanceLost(instance_id="a"))) == ["l1"]


def test_a_held_request_waits_for_the_instance_that_boots_and_not_for_the_queues_limit() -> None:
    driver, _ = make_empty(queue_timeout_s=5.0, boot_timeout_s=100.0)
    driver.arrive("r1")
    deadlines = []
    for now in (5.0, 50.0, 99.0):
        driver.now = now
        assert driver.handle(Ticked()) == ()
        deadlines.append(driver.scheduler.next_deadline())
    assert deadlines == [6.0, 51.0, 100.0], "not that of the queue, which has long passed"
    driver.handle(InstanceJoined(spec=make_spec("a"), launch_id="l1"))
    assert driver.scheduler.request_instance("r1") == "a"


def test_what_is_still_held_when_the_instance_is_up_has_its_time_anew() -> None:
    class Never:
        def dispatch(
            self, request: SchedulingRequest, cluster: ClusterSnapshot
        ) -> Placement | None:
            return None

    bundle = PolicyBundle(name="test", dispatch=Never())
    driver = Driver(bundle, min_instances=0, max_instances=1, queue_timeout_s=5.0)
    driver.arrive("r")
    driver.now = 50.0
    assert driver.handle(InstanceJoined(spec=make_spec("a"), launch_id="l1")) == ()
    driver.now = 54.0
    assert driver.report("a") == ()
    driver.now = 55.0
    (rejected,) = driver.handle(Ticked())
    assert isinstance(rejected, RejectRequest)
    assert rejected.reason == "none took it within queue_timeout_s=5 s"


def test_a_boot_that_fails_ends_the_wait_and_the_rejection_says_why() -> None:
    driver, _ = make_empty(queue_timeout_s=5.0, scaling_interval_s=1.0)
    driver.arrive("early")
    driver.now = 4.5
    driver.arrive("late")
    driver.now = 8.0
    (rejected,) = driver.handle(LaunchFailed(launch_id="l1", reason="no machine"))
    assert isinstance(rejected, RejectRequest)
    assert rejected.request_id == "early"
    assert rejected.reason == (
        "none took it within queue_timeout_s=5 s; none serves, and the last launch failed: "
        "no machine"
    )
    assert rejected.retry_after_s
    driver.now = 9.0
    assert launches(driver.handle(Ticked())) == ["l2"], "for the one that came later"


@pytest.mark.parametrize("how", ["told", "overdue"])
def test_a_boot_that_fails_ends_the_wait_while_another_boots(how: str) -> None:
    """Else launches that all fail, one begun before the other has, would keep it waiting."""
    driver, _ = make_empty(UP, queue_timeout_s=5.0, boot_timeout_s=20.0, scale_up_after_s=0.0)
    driver.arrive("r")
    driver.now = 10.0
    assert launches(driver.handle(Ticked())) == ["l2"]
    driver.now = 20.0
    is_told = how == "told"
    event = LaunchFailed(launch_id="l1", reason="no machine") if is_told else Ticked()
    rejected = driver.handle(event)[0]
    assert isinstance(rejected, RejectRequest)
    assert ("no machine" if is_told else "boot_timeout_s=20 s") in rejected.reason
    assert driver.cluster.num_booting


def test_a_launch_that_fails_is_not_tried_again_at_every_event() -> None:
    """The host may refuse a launch at once, as while an instance boots unasked."""
    driver, _ = make_empty(scaling_interval_s=1.0)
    driver.arrive("r1")
    driver.handle(LaunchFailed(launch_id="l1", reason="one is booting in the place of another"))
    assert driver.arrive("r2") == ()
    driver.now = 1.0
    assert launches(driver.handle(Ticked())) == ["l2"]


def test_a_boot_that_is_never_answered_ends_the_wait() -> None:
    driver, _ = make_empty(queue_timeout_s=5.0, boot_timeout_s=20.0)
    driver.arrive("r")
    driver.now = 20.0
    (rejected,) = driver.handle(Ticked())
    assert isinstance(rejected, RejectRequest)
    assert "it was not up within boot_timeout_s=20 s" in rejected.reason


def test_with_scaling_off_the_rejection_names_the_option() -> None:
    driver, _ = make_empty(queue_timeout_s=5.0, max_instances=0)
    assert driver.arrive("r") == ()
    driver.now = 5.0
    (rejected,) = driver.handle(Ticked())
    assert isinstance(rejected, RejectRequest)
    assert rejected.reason.endswith("none serves, and with max_instances=0 none is launched for it")


def test_the_last_instance_leaves_only_when_no_request_has_lived_for_a_while() -> None:
    """Whatever the policy has been wishing, and also for requests that fit between two looks."""
    driver, _ = make_empty(
        ScaleDown(instance_id="a", reason="idle"),
        scale_down_after_s=10.0,
        scale_down_cooldown_s=0.0,
    )
    driver.join("a")

    def pass_time(seconds: int) -> tuple[Any, ...]:
        actions: tuple[Any, ...] = ()
        for _ in range(seconds):
            driver.now += 1.0
            driver.report("a")
            actions += driver.handle(Ticked())
        return actions

    assert pass_time(9) == ()
    driver.arrive("r1")
    assert pass_time(30) == (), "it lives"
    driver.handle(RequestFinished(request_id="r1"))
    assert pass_time(8) == ()
    driver.now += 0.1
    driver.arrive("r2")
    driver.handle(RequestFinished(request_id="r2"))
    driver.now += 0.9
    assert pass_time(8) == ()
    assert pass_time(2) == (TerminateInstance(instance_id="a", reason="drained"),)
    driver.handle(InstanceLost(instance_id="a"))
    assert launches(driver.arrive("r3")) == ["l1"]


def test_one_of_two_does_not_have_to_be_idle_first() -> None:
    driver, _ = make_empty(ScaleDown(instance_id="b", reason="free"), scale_down_after_s=0.0)
    driver.join("a", "b")
    driver.arrive("r")
    driver.now = 1.0
    driver.report("a", num_used_blocks=1)
    driver.report("b")
    assert driver.cluster["b"].state is InstanceState.SERVING
    driver.handle(Ticked())
    assert driver.cluster["b"].state is not InstanceState.SERVING


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ParamError, match=r"min_instances \(3\) must not be above max_instances"):
        SchedulerOptions(min_instances=3, max_instances=2)
    assert SchedulerOptions(min_instances=3).max_instances == 0


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


@pytest.mark.parametrize("max_instances", [0, 4])
def test_what_boots_in_the_place_of_another_is_waited_for(max_instances: int) -> None:
    driver, _ = make_driver(None, max_instances=max_instances, queue_timeout_s=5.0)
    driver.handle(ReplacementsCounted(num_instances=2))
    for instance_id in list(driver.cluster.instance_ids):
        assert driver.handle(InstanceLost(instance_id=instance_id)) == ()
    assert driver.arrive("r") == ()
    driver.now = 100.0
    assert driver.handle(Ticked()) == (), "loading a model takes its time"
    (placed,) = driver.handle(InstanceJoined(spec=make_spec("later")))
    assert isinstance(placed, DispatchRequest)


def test_what_fails_to_boot_in_the_place_of_another_is_not_waited_for() -> None:
    driver, _ = make_driver(None, max_instances=0, queue_timeout_s=5.0)
    driver.handle(ReplacementsCounted(num_instances=1))
    for instance_id in list(driver.cluster.instance_ids):
        driver.handle(InstanceLost(instance_id=instance_id))
    driver.arrive("r")
    driver.now = 100.0
    (rejected,) = driver.handle(ReplacementsCounted(num_instances=0))
    assert isinstance(rejected, RejectRequest)
