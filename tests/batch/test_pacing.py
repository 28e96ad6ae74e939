"""How many lines are in flight, by what the endpoint says of its room."""

from __future__ import annotations

from typing import Any

from llumsched.batch.pacing import Pace, Room, room_of


def room(**changes: Any) -> Room:
    values = {"num_instances": 2, "num_others": 0, "num_waiting": 0, "cache_usage": 0.1}
    return Room(**{**values, **changes})


def test_idle_room_is_filled_a_line_an_instance_at_a_time() -> None:
    pace = Pace(most_in_flight=6)
    limits = []
    for _ in range(4):
        pace.observe(room(), pace.limit)
        limits.append(pace.limit)
    assert limits == [3, 5, 6, 6]


def test_a_limit_that_is_not_used_does_not_grow() -> None:
    pace = Pace(limit=10)
    pace.observe(room(), 3)
    assert pace.limit == 10


def test_others_leave_a_share_at_once() -> None:
    pace = Pace(limit=100)
    pace.observe(room(num_others=1), 100)
    assert pace.limit == 2


def test_a_batch_that_is_late_does_not_yield_to_others_that_merely_run() -> None:
    pace = Pace(limit=10)
    pace.observe(room(num_others=1), 10, is_late=True)
    assert pace.limit == 12
    pace.observe(room(num_others=1, num_waiting=4), 12, is_late=True)
    assert pace.limit == 8


def test_what_waits_is_too_much() -> None:
    pace = Pace(limit=40)
    pace.observe(room(num_waiting=5), 40)
    assert pace.limit == 35


def test_a_full_cache_is_left_alone() -> None:
    pace = Pace(limit=40)
    pace.observe(room(cache_usage=0.95), 40)
    assert pace.limit == 20


def test_nothing_is_sent_where_nothing_serves_and_then_it_begins_again() -> None:
    pace = Pace(limit=40)
    pace.observe(room(num_instances=0), 0)
    assert pace.limit == 0
    pace.observe(room(), 0)
    assert pace.limit == 2


def test_an_endpoint_that_says_nothing_is_judged_by_its_answers() -> None:
    pace = Pace(limit=8, most_in_flight=9)
    pace.answered(is_overloaded=True)
    assert pace.limit == 4
    for _ in range(9):
        pace.answered(is_overloaded=False)
    assert pace.limit == 9


def test_room_is_that_of_all_serving_instances_and_bulk_work_is_no_other() -> None:
    load = {
        "num_running_by_class": [[-1, 5], [0, 2], [1, 1]],
        "num_waiting": 1,
        "num_free_blocks": 25,
        "num_total_blocks": 100,
    }
    described = {
        "instances": [
            {"state": "serving", "load": load},
            {"state": "serving", "load": {**load, "num_free_blocks": 90}},
            {"state": "draining", "load": load},
            {"state": "serving", "load": None},
        ],
        "queued": {"low": 2, "normal": 1},
    }
    assert room_of(described) == Room(
        num_instances=2, num_others=7, num_waiting=5, cache_usage=0.75
    )
