"""A prompt waits at the scheduler until an instance has room; shorter ones pass; none starves."""

from __future__ import annotations

from llumsched.core.actions import DispatchRequest
from tests.policies.clusters import make_driver, place, report, tick

BUSY = {
    "a": {"num_used_blocks": 80, "num_running": 5},
    "b": {"num_used_blocks": 90, "num_running": 2},
    "c": {"num_used_blocks": 75, "num_running": 8},
}
"""Instances have 100 blocks."""


def test_a_prompt_that_fits_nowhere_waits_and_goes_to_the_first_room() -> None:
    driver = make_driver("late_binding", BUSY)
    assert place(driver, "big", num_blocks=40) is None
    actions = report(driver, "a", {"num_used_blocks": 50, "num_running": 3})
    (dispatch,) = [a for a in actions if isinstance(a, DispatchRequest)]
    assert (dispatch.request_id, dispatch.instance_id) == ("big", "a")


def test_shorter_ones_pass_it_while_an_instance_is_cleared() -> None:
    driver = make_driver("late_binding", BUSY)
    place(driver, "big", num_blocks=40)
    assert place(driver, "small", num_blocks=8) == "b"
    # The instance with the most room gives its requests away ...
    assert "c" in {source for source, _ in tick(driver)}


def test_what_needs_no_holding_stays_off_the_instance_being_cleared() -> None:
    driver = make_driver("late_binding", BUSY | {"c": {"num_used_blocks": 70, "num_running": 1}})
    place(driver, "big", num_blocks=40)
    # Too short to wait for room anywhere. "c" is the freest by far.
    assert place(driver, "tiny", num_prompt_tokens=1) != "c"


def test_the_freest_is_chosen_among_those_with_room_only() -> None:
    driver = make_driver("late_binding", BUSY)
    # By freeness alone it would be "b": ten blocks, but for two requests.
    assert place(driver, num_blocks=18) == "a"


def test_a_prompt_being_computed_is_avoided_while_another_has_room() -> None:
    loads = {
        "a": {"num_used_blocks": 10, "num_running": 1, "num_prefill_tokens_pending": 5000},
        "b": {"num_used_blocks": 50, "num_running": 4},
    }
    assert place(make_driver("late_binding", loads), num_blocks=4) == "b"
    loads["b"] = {"num_used_blocks": 99, "num_running": 4}
    assert place(make_driver("late_binding", loads), num_blocks=4) == "a"


def test_none_that_waits_too_is_sent_to_the_instance_being_cleared_for_another() -> None:
    loads = {
        "a": {"num_used_blocks": 98, "num_running": 5},
        "b": {"num_used_blocks": 70, "num_running": 5},
    }
    driver = make_driver("late_binding", loads)
    assert place(driver, "big", num_blocks=40) is None
    # It would fit on "b", again and again, and "big" would never run.
    assert place(driver, "medium", num_blocks=10) is None
    report(driver, "b", {"num_used_blocks": 55, "num_running": 4})
    assert driver.scheduler.request_instance("big") == "b"
    assert driver.scheduler.request_instance("medium") is None
