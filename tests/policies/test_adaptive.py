"""`adaptive`: the least expected cost decides where requests go, when they wait, and what moves."""

from __future__ import annotations

from llumsched.core.actions import DispatchRequest, StartMigration
from llumsched.core.events import DrainRequested, KvBlocksStored, Ticked
from llumsched.core.types import PriorityClass
from tests.policies.clusters import make_driver, place, report, tick

# Instances have 100 blocks of 16 tokens; a step takes 40 ms, so a request grows by 12 tokens until
# a migration can take effect.
STEP = {"step_time_s": 0.04}
QUIET = {"num_used_blocks": 20, "num_running": 2, **STEP}


def test_prompts_that_are_pending_there_count_in_the_time_they_take() -> None:
    busy = QUIET | {"num_prefill_tokens_pending": 4000}
    assert place(make_driver("adaptive", {"a": busy, "b": QUIET})) == "b"


def test_pending_prompts_are_computed_between_reports() -> None:
    pending = QUIET | {"num_prefill_tokens_pending": 4000}
    crowded = QUIET | {"num_running": 30}
    driver = make_driver("adaptive", {"a": pending, "b": crowded})
    assert place(driver, "early") == "b"
    driver.now += 2.5
    assert place(driver, "late") == "a"


def test_a_cached_prefix_is_worth_the_prefill_that_it_saves() -> None:
    driver = make_driver("adaptive", {"a": QUIET, "b": QUIET | {"num_running": 4}})
    assert place(driver, "r1", num_blocks=40) == "a"
    driver = make_driver("adaptive", {"a": QUIET, "b": QUIET | {"num_running": 4}})
    driver.handle(KvBlocksStored(instance_id="b", block_hashes=tuple(range(38))))
    assert place(driver, "r2", num_blocks=40, prefix_hashes=tuple(range(40))) == "b"


def test_a_burst_spreads_by_the_load_it_makes_itself() -> None:
    driver = make_driver("adaptive", dict.fromkeys("abcd", QUIET))
    placed = [place(driver, f"r{number}", num_blocks=10) for number in range(8)]
    assert sorted(map(str, placed)) == sorted("abcd" * 2)


def test_what_fits_nowhere_waits_for_room_and_shorter_ones_pass_for_a_while() -> None:
    full = {"num_used_blocks": 80, "num_running": 5, **STEP}
    driver = make_driver("adaptive", {"a": full, "b": full})
    assert place(driver, "big", num_blocks=40) is None
    assert place(driver, "small", num_blocks=4) is not None
    driver.now += 2.5
    # It has been passed for long enough.
    assert place(driver, "later", num_blocks=4) is None
    actions = report(driver, "a", {"num_used_blocks": 30, "num_running": 2, **STEP})
    dispatched = [a.request_id for a in actions if isinstance(a, DispatchRequest)]
    assert dispatched == ["big", "later"]


def test_an_idle_instance_takes_what_leaves_no_room_to_grow() -> None:
    assert place(make_driver("adaptive", {"a": STEP}), num_blocks=100) == "a"


def test_a_request_of_high_priority_keeps_away_from_others_more_than_others_do() -> None:
    cluster = {
        "a": QUIET | {"num_prefill_tokens_pending": 500},
        "b": QUIET | {"num_running": 30, "num_used_blocks": 30},
    }
    high = PriorityClass.HIGH
    assert place(make_driver("adaptive", cluster), "normal", num_blocks=8) == "a"
    assert (
        place(make_driver("adaptive", cluster), "h", num_blocks=8, execution_priority=high) == "b"
    )


def test_nothing_moves_while_there_is_room_to_grow() -> None:
    uneven = {
        "a": {"num_used_blocks": 70, "num_running": 4, "victim_blocks": 5, **STEP},
        "b": {"num_used_blocks": 5, "num_running": 1, **STEP},
    }
    assert tick(make_driver("adaptive", uneven), 0.2) == []


def test_a_request_leaves_before_its_instance_is_out_of_blocks() -> None:
    tight = {
        "a": {"num_used_blocks": 99, "num_running": 6, "victim_blocks": 5, **STEP},
        "b": {"num_used_blocks": 50, "num_running": 3, **STEP},
        "c": {"num_used_blocks": 20, "num_running": 1, **STEP},
    }
    driver = make_driver("adaptive", tight)
    driver.now += 0.2
    (move,) = (a for a in driver.handle(Ticked()) if isinstance(a, StartMigration))
    assert (move.source, move.destination) == ("a", "c")
    assert "expected to save" in move.reason
    # The decision log has both beside the outcome.
    assert move.expected_win_s is not None
    assert move.expected_cost_s is not None
    assert move.expected_win_s > move.expected_cost_s > 0


def test_nothing_moves_where_everything_is_full() -> None:
    full = {"num_used_blocks": 99, "num_running": 6, "victim_blocks": 5, **STEP}
    assert tick(make_driver("adaptive", dict.fromkeys("abc", full)), 0.2) == []


def test_nobody_is_moved_behind_more_waiting_than_the_move_saves() -> None:
    tight = {
        "a": {"num_used_blocks": 99, "num_running": 6, "victim_blocks": 5, **STEP},
        "b": {"num_running": 1, "num_used_blocks": 1, "num_prefill_tokens_pending": 10**6, **STEP},
    }
    assert tick(make_driver("adaptive", tight), 0.2) == []


def test_the_instance_with_most_room_is_cleared_for_what_waits() -> None:
    cluster = {
        "a": {"num_used_blocks": 60, "num_running": 6, "victim_blocks": 10, **STEP},
        "b": {"num_used_blocks": 65, "num_running": 4, "victim_blocks": 10, **STEP},
        "c": {"num_used_blocks": 65, "num_running": 4, "victim_blocks": 10, **STEP},
    }
    driver = make_driver("adaptive", cluster)
    assert place(driver, "big", num_blocks=55) is None
    assert {source for source, _ in tick(driver, 0.2)} == {"a"}


def test_a_draining_instance_is_emptied() -> None:
    driver = make_driver("adaptive", {"a": QUIET, "b": QUIET})
    driver.handle(DrainRequested(instance_id="a"))
    assert tick(driver, 0.2) == [("a", "b")]
