"""Requests in, placements out: order, bounds, staleness, reconciliation, failing policies."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from llumsched.core.actions import DispatchRequest, PolicyFailed, Rejection, RejectRequest
from llumsched.core.events import (
    DrainRequested,
    InstanceJoined,
    InstanceLost,
    RequestAborted,
    RequestArrived,
    RequestFinished,
    Ticked,
)
from llumsched.core.policy import ADMIT, Hold, Placement, PolicyBundle, Reject
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.core.types import PriorityClass, SchedulingRequest
from llumsched.policies.freeness import Freeness
from tests.core.builders import TOTAL_BLOCKS, Driver, make_request, make_spec


def dispatched(actions: tuple[Any, ...]) -> list[tuple[str, str]]:
    return [(a.request_id, a.instance_id) for a in actions if isinstance(a, DispatchRequest)]


# Placement and the overlay.


def test_a_request_goes_to_the_freest_instance() -> None:
    driver = Driver()
    driver.join("a", "b")
    driver.report("a", num_used_blocks=50, num_running=5)
    driver.report("b", num_used_blocks=20, num_running=5)
    (action,) = driver.arrive("r")
    assert action == DispatchRequest(request_id="r", instance_id="b", reason="freeness=16.0")
    assert driver.scheduler.request_instance("r") == "b"


def test_ties_go_to_the_lowest_instance_id() -> None:
    driver = Driver()
    driver.join("b", "c", "a")
    assert dispatched(driver.arrive("r")) == [("r", "a")]


def test_a_burst_spreads_before_any_report_comes() -> None:
    driver = Driver()
    driver.join("a", "b")
    placed = [dispatched(driver.arrive(f"r{i}", num_blocks=10))[0][1] for i in range(6)]
    assert placed == ["a", "b"] * 3


def test_an_overlay_lasts_until_a_report_names_the_request() -> None:
    driver = Driver()
    driver.join("a")
    driver.arrive("r1", num_blocks=10)
    driver.arrive("r2", num_blocks=20)
    assert driver.cluster["a"].num_free_blocks == TOTAL_BLOCKS - 30

    driver.report("a", num_used_blocks=10, received_request_ids=("r1",))
    assert driver.cluster["a"].num_free_blocks == TOTAL_BLOCKS - 10 - 20
    assert driver.cluster["a"].num_requests == 2

    driver.report("a", num_used_blocks=30, num_running=2, received_request_ids=("r2",))
    assert driver.cluster["a"].num_free_blocks == TOTAL_BLOCKS - 30


def test_an_overlay_ends_with_its_request() -> None:
    driver = Driver()
    driver.join("a")
    driver.arrive("r", num_blocks=10)
    driver.handle(RequestAborted(request_id="r"))
    assert driver.cluster["a"].freeness == math.inf
    assert driver.scheduler.num_requests == 0


def test_an_overtaken_report_still_names_requests_but_its_numbers_are_ignored() -> None:
    driver = Driver()
    driver.join("a")
    driver.arrive("r", num_blocks=10)
    driver.report("a", num_used_blocks=30, sequence=7)
    driver.report("a", num_used_blocks=5, sequence=6, received_request_ids=("r",))
    assert driver.cluster["a"].num_free_blocks == TOTAL_BLOCKS - 30


def test_a_second_arrival_of_a_live_id_changes_nothing() -> None:
    driver = Driver()
    driver.join("a")
    driver.arrive("r")
    assert driver.arrive("r") == ()
    assert driver.scheduler.num_requests == 1


def test_an_end_may_be_told_twice() -> None:
    driver = Driver()
    driver.join("a")
    driver.arrive("r")
    driver.report("a", received_request_ids=("r",), finished_request_ids=("r",))
    assert driver.handle(RequestFinished(request_id="r")) == ()


def test_an_end_that_was_never_told_is_noticed_when_the_instance_is_empty() -> None:
    driver = Driver(stale_after_s=3.0)
    driver.join("a")
    driver.arrive("r")
    driver.report("a", num_used_blocks=1, received_request_ids=("r",))
    driver.now = 10.0
    driver.report("a")
    assert driver.scheduler.num_requests == 0


def test_a_prompt_that_fits_nowhere_is_rejected_with_the_reason() -> None:
    driver = Driver()
    driver.join("a")
    (action,) = driver.arrive("r", num_blocks=TOTAL_BLOCKS + 1)
    assert isinstance(action, RejectRequest)
    assert "exceeds the KV cache of every instance (the largest has 100 blocks)" in action.reason
    assert driver.scheduler.num_requests == 0


def test_different_block_sizes_are_each_counted_in_their_own() -> None:
    driver = Driver()
    driver.join("a", num_total_blocks=10, block_size=16)
    driver.join("b", num_total_blocks=10, block_size=32)
    (action,) = driver.arrive("r", num_blocks=16)  # 256 tokens: 16 blocks, or 8 of the larger
    assert dispatched((action,)) == [("r", "b")]


def test_a_placement_that_cannot_hold_the_prompt_is_replaced() -> None:
    small = Scripted(lambda _: Placement(instance_id="small", reason="mistaken"))
    driver = Driver(PolicyBundle(name="test", dispatch=small))
    driver.join("small", num_total_blocks=10)
    driver.join("zbig")
    failed, placed = driver.arrive("r", num_blocks=50)
    assert isinstance(failed, PolicyFailed)
    assert failed.error == "chose instance 'small', which cannot hold the prompt"
    assert dispatched((placed,)) == [("r", "zbig")]


def test_what_only_a_draining_instance_could_hold_waits_and_others_pass() -> None:
    driver = Driver()
    driver.join("big")
    driver.join("small", num_total_blocks=10)
    driver.arrive("x")
    driver.handle(DrainRequested(instance_id="big"))
    assert driver.arrive("r1", num_blocks=50) == ()
    assert dispatched(driver.arrive("r2")) == [("r2", "small")]


def test_a_running_request_whose_only_instance_died_is_not_rejected() -> None:
    driver = Driver()
    driver.join("big")
    driver.join("small", num_total_blocks=10)
    driver.arrive("r", num_blocks=50)
    assert driver.handle(InstanceLost(instance_id="big")) == ()
    assert dispatched(driver.arrive("r2")) == [("r2", "small")]
    assert dispatched(driver.handle(_joined("big"))) == [("r", "big")]


# The queue.


def test_requests_wait_while_there_is_no_instance() -> None:
    driver = Driver()
    assert driver.arrive("r1") == ()
    assert driver.arrive("r2") == ()
    assert driver.scheduler.num_queued_by_class() == {PriorityClass.NORMAL: 2}
    actions = driver.handle(_joined("a"))
    assert dispatched(actions) == [("r1", "a"), ("r2", "a")]


def test_high_priority_goes_first_and_within_a_class_the_first_come() -> None:
    driver = Driver()
    driver.arrive("n1")
    driver.arrive("h1", scheduling_priority=PriorityClass.HIGH)
    driver.arrive("n2")
    driver.arrive("h2", scheduling_priority=PriorityClass.HIGH)
    actions = driver.handle(_joined("a"))
    assert [request_id for request_id, _ in dispatched(actions)] == ["h1", "h2", "n1", "n2"]


def test_a_full_queue_sheds_the_lowest_class_and_the_newest_of_it() -> None:
    driver = Driver(max_queued_requests=2)
    driver.arrive("n1")
    driver.arrive("n2")
    (shed,) = driver.arrive("h", scheduling_priority=PriorityClass.HIGH)
    assert isinstance(shed, RejectRequest)
    assert (shed.request_id, shed.retry_after_s) == ("n2", 1.0)
    assert shed.reason == "the dispatch queue is full (2 requests)"
    (shed,) = driver.arrive("n3")
    assert isinstance(shed, RejectRequest)
    assert shed.request_id == "n3"


def test_a_full_queue_does_not_shed_what_has_begun() -> None:
    """Not even for a higher class: its client has been promised the rest."""
    driver = Driver(max_queued_requests=1)
    driver.join("a")
    driver.arrive("begun")
    driver.handle(InstanceLost(instance_id="a"))
    (shed,) = driver.arrive("h", scheduling_priority=PriorityClass.HIGH)
    assert isinstance(shed, RejectRequest)
    assert shed.request_id == "h"


def test_a_client_with_many_held_requests_is_told_so_while_others_are_not() -> None:
    driver = Driver(max_queued_per_client=2)
    assert not driver.arrive("a1", client_id="a")
    assert not driver.arrive("a2", client_id="a")
    (shed,) = driver.arrive("a3", client_id="a")
    assert isinstance(shed, RejectRequest)
    assert (shed.request_id, shed.rejection) == ("a3", Rejection.CLIENT_LIMIT)
    assert not driver.arrive("b1", client_id="b")
    driver.handle(RequestAborted(request_id="a1"))
    assert not driver.arrive("a4", client_id="a")


def test_clients_take_turns_if_that_is_wished() -> None:
    """Client a floods the queue; b and c, who come after it, do not wait for all of that."""
    driver = Driver(fair_clients=True)
    for index in range(4):
        driver.arrive(f"a{index}", client_id="a", num_blocks=2)
    driver.arrive("b0", client_id="b", num_blocks=3)
    driver.arrive("b1", client_id="b", num_blocks=3)
    driver.arrive("c0", client_id="c", num_blocks=1)
    actions = driver.handle(_joined("a"))
    order = [request_id for request_id, _ in dispatched(actions)]
    assert order == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]


def test_a_client_whose_answers_are_long_waits_longer() -> None:
    driver = Driver(fair_clients=True)
    driver.join("i")
    driver.arrive("a0", client_id="a")
    driver.handle(RequestFinished(request_id="a0", num_output_tokens=1000))
    driver.handle(InstanceLost(instance_id="i"))
    driver.arrive("a1", client_id="a")
    driver.arrive("b0", client_id="b")
    driver.arrive("b1", client_id="b")
    actions = driver.handle(_joined("j"))
    assert [request_id for request_id, _ in dispatched(actions)] == ["b0", "b1", "a1"]


def test_classes_come_before_turns() -> None:
    driver = Driver(fair_clients=True)
    driver.arrive("b", client_id="b")
    driver.arrive("a0", client_id="a", scheduling_priority=PriorityClass.HIGH)
    driver.arrive("a1", client_id="a", scheduling_priority=PriorityClass.HIGH)
    actions = driver.handle(_joined("i"))
    assert [request_id for request_id, _ in dispatched(actions)] == ["a0", "a1", "b"]


def test_a_request_is_held_while_enough_wait_at_every_instance() -> None:
    driver = Driver(max_waiting_per_instance=3)
    driver.join("a", "b")
    driver.report("a", num_used_blocks=10, num_running=5, num_waiting=3)
    driver.report("b", num_used_blocks=90, num_running=5, num_waiting=2)
    # The policy prefers a, where enough are waiting.
    assert dispatched(driver.arrive("r0")) == [("r0", "b")]
    driver.report("b", num_used_blocks=90, num_running=5, num_waiting=3)
    assert driver.arrive("r1") == ()
    assert dispatched(driver.report("a", num_used_blocks=10, num_running=6, num_waiting=2)) == [
        ("r1", "a")
    ]


def test_what_has_begun_waits_anywhere() -> None:
    driver = Driver(max_waiting_per_instance=1)
    driver.join("a", "b")
    driver.report("b", num_used_blocks=90, num_running=5)
    assert dispatched(driver.arrive("r")) == [("r", "a")]
    driver.report("b", num_used_blocks=90, num_running=5, num_waiting=1)
    assert dispatched(driver.handle(InstanceLost(instance_id="a"))) == [("r", "b")]


def test_a_request_held_past_its_deadline_is_rejected() -> None:
    driver = Driver(queue_timeout_s=5.0)
    driver.arrive("r1")
    driver.now = 2.0
    driver.arrive("r2")
    assert driver.scheduler.next_deadline() == 5.0
    driver.now = 5.0
    (action,) = driver.handle(Ticked())
    assert isinstance(action, RejectRequest)
    assert action.request_id == "r1"
    assert driver.scheduler.next_deadline() == 7.0


def test_a_held_request_can_be_aborted() -> None:
    driver = Driver()
    driver.arrive("r")
    driver.handle(RequestAborted(request_id="r"))
    assert driver.handle(_joined("a")) == ()
    assert driver.scheduler.next_deadline() is None


# Instances that die, drain or fall silent.


def test_requests_of_a_lost_instance_are_dispatched_again_before_later_ones() -> None:
    driver = Driver()
    driver.join("a")
    driver.arrive("r1")
    driver.arrive("r2")
    assert driver.handle(InstanceLost(instance_id="a")) == ()
    driver.arrive("r3")
    actions = driver.handle(_joined("b"))
    assert dispatched(actions) == [("r1", "b"), ("r2", "b"), ("r3", "b")]
    assert "its instance was lost" in actions[0].reason  # type: ignore[union-attr]
    assert "its instance was lost" not in actions[2].reason  # type: ignore[union-attr]


def test_a_draining_instance_is_given_nothing() -> None:
    driver = Driver()
    driver.join("a", "b")
    driver.report("a", num_used_blocks=1)
    driver.report("b", num_used_blocks=90)
    driver.handle(DrainRequested(instance_id="a"))
    assert dispatched(driver.arrive("r")) == [("r", "b")]


def test_a_silent_instance_is_not_dispatched_to_until_it_reports_again() -> None:
    driver = Driver(stale_after_s=3.0)
    driver.join("a", "b")
    driver.now = 3.5
    driver.report("b", num_used_blocks=90)
    assert dispatched(driver.arrive("r1")) == [("r1", "b")]
    driver.report("a")
    assert dispatched(driver.arrive("r2")) == [("r2", "a")]


def test_when_none_reports_the_known_instances_take_turns() -> None:
    driver = Driver(stale_after_s=3.0)
    driver.join("a", "b", "c")
    driver.handle(DrainRequested(instance_id="b"))
    driver.now = 100.0
    actions = [driver.arrive(f"r{i}")[0] for i in range(4)]
    assert [a.instance_id for a in actions] == ["a", "c", "a", "c"]  # type: ignore[union-attr]
    assert actions[0].reason == "no instance reports its load; round-robin"  # type: ignore[union-attr]
    driver.join("d", num_total_blocks=2000)
    driver.now = 200.0
    assert dispatched(driver.arrive("long", num_blocks=500)) == [("long", "d")]


def test_a_scheduler_that_restarts_learns_requests_from_the_instances() -> None:
    driver = Driver()
    driver.handle(_joined("a", request_ids=("r1", "r2")))
    assert driver.scheduler.request_instance("r2") == "a"


def test_an_instance_that_joins_again_keeps_what_it_names() -> None:
    driver = Driver()
    driver.join("a")
    driver.arrive("r1")
    driver.arrive("r2")
    actions = driver.handle(_joined("a", request_ids=("r2",)))
    assert dispatched(actions) == [("r1", "a")]
    assert driver.scheduler.request_instance("r2") == "a"


# Policies that fail.


class Scripted:
    """A dispatch and admission policy that does what the test says."""

    def __init__(self, answer: Callable[[ClusterSnapshot], Any]) -> None:
        self.answer = answer

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Any:
        return self.answer(cluster)


class ScriptedAdmission(Scripted):
    def admit(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Any:
        return self.answer(cluster)


def explode(cluster: ClusterSnapshot) -> Any:
    raise RuntimeError("broken")


def vandalise(cluster: ClusterSnapshot) -> Any:
    cluster.columns.num_free_blocks[0] = 0


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (explode, "RuntimeError: broken"),
        (vandalise, "ValueError: assignment destination is read-only"),
        (lambda _: "a", "answered 'a', not Placement or Hold"),
        (lambda _: Placement(instance_id="zz", reason=""), "chose unknown instance 'zz'"),
        (lambda _: Placement(instance_id=[], reason=""), "whose instance_id is []"),  # type: ignore[arg-type]
        (lambda _: Placement(instance_id="b", reason=None), "whose reason is None"),  # type: ignore[arg-type]
        (lambda _: Placement(instance_id="d", reason=""), "instance 'd', which is draining"),
        (lambda _: Placement(instance_id="s", reason=""), "instance 's', which is stale"),
    ],
)
def test_a_dispatch_policy_that_fails_costs_one_report_and_is_replaced(
    answer: Callable[[ClusterSnapshot], Any], error: str
) -> None:
    driver = Driver(PolicyBundle(name="test", dispatch=Scripted(answer)))
    driver.join("s")
    driver.now = 10.0
    driver.join("a", "b", "d")
    driver.report("a", num_used_blocks=50)
    driver.report("b", num_used_blocks=10)
    driver.report("d", num_used_blocks=1)
    driver.handle(DrainRequested(instance_id="d", deadline_s=100))
    failed, placed = driver.arrive("r")
    assert isinstance(failed, PolicyFailed)
    assert failed.policy == "Scripted"
    assert error in failed.error
    assert placed == DispatchRequest(
        request_id="r", instance_id="b", reason="built-in least-loaded choice"
    )


@pytest.mark.parametrize("answer", [explode, lambda _: None, lambda _: Reject(reason=3)])  # type: ignore[arg-type]
def test_an_admission_policy_that_fails_admits(answer: Callable[[ClusterSnapshot], Any]) -> None:
    bundle = PolicyBundle(name="test", dispatch=Freeness(), admission=ScriptedAdmission(answer))
    driver = Driver(bundle)
    driver.join("a")
    failed, placed = driver.arrive("r")
    assert isinstance(failed, PolicyFailed)
    assert dispatched((placed,)) == [("r", "a")]


class Gate:
    """Admission by the request's id: rejects `no…`, holds `wait…` and `stop…`."""

    def __init__(self) -> None:
        self.is_open = False
        self.num_asked = 0

    def admit(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Any:
        self.num_asked += 1
        if request.request_id.startswith("no"):
            return Reject(reason="not today", retry_after_s=9.0)
        if not self.is_open and request.request_id.startswith(("wait", "stop")):
            return Hold(reason="later", others_may_pass=request.request_id.startswith("wait"))
        return ADMIT


def test_admission_rejects_holds_and_lets_others_pass_or_not() -> None:
    gate = Gate()
    driver = Driver(PolicyBundle(name="test", dispatch=Freeness(), admission=gate))
    driver.join("a")
    assert driver.arrive("no") == (
        RejectRequest(request_id="no", reason="not today", retry_after_s=9.0),
    )
    assert driver.arrive("wait") == ()
    assert dispatched(driver.arrive("r1")) == [("r1", "a")]
    assert driver.arrive("stop") == ()
    assert driver.arrive("r2") == ()
    gate.is_open = True
    assert dispatched(driver.report("a")) == [("wait", "a"), ("stop", "a"), ("r2", "a")]


def test_admission_has_no_say_in_what_has_begun() -> None:
    driver = Driver(PolicyBundle(name="test", dispatch=Freeness(), admission=Gate()))
    driver.join("a")
    request = make_request("no")
    assert dispatched(driver.handle(RequestArrived(request=request, has_begun=True))) == [
        ("no", "a")
    ]


def test_many_held_requests_are_not_all_tried_at_every_report() -> None:
    gate = Gate()
    driver = Driver(PolicyBundle(name="test", dispatch=Freeness(), admission=gate))
    driver.join("a")
    for number in range(12):
        driver.arrive(f"wait{number}")
    driver.report("a")
    num_asked = gate.num_asked
    driver.report("a")
    assert gate.num_asked == num_asked
    # A new one that may pass them does not wait for their turn.
    assert dispatched(driver.arrive("r")) == [("r", "a")]
    gate.is_open = True
    deadline_s = driver.scheduler.next_deadline()
    assert deadline_s is not None
    assert deadline_s == pytest.approx(0.02)
    driver.now = deadline_s
    assert len(dispatched(driver.handle(Ticked()))) == 12


def _joined(instance_id: str, request_ids: tuple[str, ...] = ()) -> InstanceJoined:
    return InstanceJoined(spec=make_spec(instance_id), request_ids=request_ids)
