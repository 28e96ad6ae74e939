"""A prompt waits at the scheduler until an instance has room; others pass; none starves."""

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
    assert place(driver, "small", num_blocks=8) == "a"
    # The instance with the most room gives its requests away ...
    assert "c" in {source for source, _ in tick(driver)}


def test_what_is_short_stays_off_the_instance_being_cleared() -> None:
    driver = make_driver("late_binding", BUSY | {"c": {"num_used_blocks": 70, "num_running": 1}})
    place(driver, "big", num_blocks=40)
    # "c" is the freest by far.
    assert place(driver, "tiny", num_prompt_tokens=1) != "c"


def test_the_freest_is_chosen_among_those_with_room_only() -> None:
    loads = {
        "a": {"num_used_blocks": 90, "num_running": 5},
        "b": {"num_used_blocks": 97, "num_running": 1},
    }
    # By freeness alone it would be "b": three blocks, but for one request.
    assert place(make_driver("late_binding", loads), num_blocks=4) == "a"


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


LIGHT = {
    "a": {"num_used_blocks": 20, "num_running": 4},
    "b": {"num_used_blocks": 40, "num_running": 2},
    "c": {"num_used_blocks": 50, "num_running": 3},
}


def test_the_most_room_is_for_long_prompts_whoever_runs_there() -> None:
    assert place(make_driver("late_binding", LIGHT), num_blocks=10) == "a"
    assert place(make_driver("late_binding", LIGHT), num_blocks=1) == "b"


def test_the_most_room_is_kept_clear_of_short_ones_only_while_another_is_free_enough() -> None:
    loads = {"a": {"num_used_blocks": 20, "num_running": 4}}
    free_enough = loads | {"b": {"num_used_blocks": 60, "num_running": 4}}
    assert place(make_driver("late_binding", free_enough), num_blocks=1) == "b"
    not_so = loads | {"b": {"num_used_blocks": 64, "num_running": 4}}
    assert place(make_driver("late_binding", not_so), num_blocks=1) == "a"


def test_an_idle_instance_is_not_kept_clear_for_long() -> None:
    """Of two instances, the one that is kept clear serves as soon as it is much the freer."""
    loads = {"a": {}, "b": {"num_used_blocks": 20, "num_running": 5}}
    assert place(make_driver("late_binding", loads), num_blocks=1) == "a"


def test_room_to_grow_is_left_where_it_can_be_and_must_be_once_many_wait() -> None:
    loads = {
        "a": {"num_used_blocks": 90, "num_running": 4},
        "b": {"num_used_blocks": 75, "num_running": 11},
    }
    # Two blocks for each of those that run. By freeness it would be "a".
    assert place(make_driver("late_binding", loads), num_blocks=3) == "b"
    # Now "b" is for the first of those that wait.
    for num_waiting, where in ((3, "a"), (4, None)):
        driver = make_driver("late_binding", loads)
        for number in range(num_waiting):
            assert place(driver, f"long-{number}", num_blocks=40) is None
        assert place(driver, "short", num_blocks=3) == where
    report(driver, "a", {"num_used_blocks": 88, "num_running": 4})
    assert driver.scheduler.request_instance("short") == "a"
