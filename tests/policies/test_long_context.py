"""Room is kept, and cleared before the long prompt is admitted; prefill stalls are bounded."""

from __future__ import annotations

from llumsched.core.actions import DispatchRequest
from llumsched.core.events import DrainRequested, MigrationFinished, MigrationOutcome, Ticked
from tests.policies.clusters import make_driver, place, report, tick

LONG = 60
"""Blocks of a long prompt; instances have 100."""


def busy() -> dict[str, dict[str, int]]:
    return {
        "a": {"num_used_blocks": 55, "num_running": 5},
        "b": {"num_used_blocks": 65, "num_running": 5},
        "c": {"num_used_blocks": 50, "num_running": 3},
    }


def test_room_is_cleared_before_a_long_prompt_is_admitted() -> None:
    driver = make_driver("long_context", busy())
    # 150 blocks are free in all, but no instance has 60: the prompt is held, not dispatched.
    assert place(driver, "long", num_blocks=LONG) is None
    # The instance with the fewest blocks to move is cleared, onto both others.
    assert tick(driver) == [("c", "a"), ("c", "b")]
    actions = report(driver, "c", {"num_used_blocks": 17, "num_running": 1})
    (dispatch,) = [a for a in actions if isinstance(a, DispatchRequest)]
    assert (dispatch.request_id, dispatch.instance_id) == ("long", "c")


def test_short_prompts_pass_but_stay_off_the_instance_being_cleared() -> None:
    driver = make_driver("long_context", busy())
    place(driver, "long", num_blocks=LONG)
    placed = [place(driver, f"r{i}") for i in range(4)]
    assert None not in placed
    assert "c" not in placed


def test_clearing_goes_on_until_there_is_room() -> None:
    driver = make_driver("long_context", busy())
    place(driver, "long", num_blocks=LONG)
    driver.now = 1.0
    for action in driver.handle(Ticked()):
        driver.handle(
            MigrationFinished(
                migration_id=action.migration_id,  # type: ignore[union-attr]
                request_id="x",
                source="c",
                destination=action.destination,  # type: ignore[union-attr]
                outcome=MigrationOutcome.COMMITTED,
            )
        )
    report(driver, "c", {"num_used_blocks": 45, "num_running": 2})
    assert driver.scheduler.request_instance("long") is None
    assert tick(driver)[0][0] == "c"


def test_the_others_are_balanced_and_drained_meanwhile() -> None:
    driver = make_driver("long_context", busy() | {"d": {"num_used_blocks": 97, "num_running": 9}})
    place(driver, "long", num_blocks=LONG)
    driver.handle(DrainRequested(instance_id="d"))
    moved = tick(driver)
    assert ("c", "a") in moved
    assert [destination for source, destination in moved if source == "d"] == []
    report(driver, "b", {"num_used_blocks": 40, "num_running": 2})
    assert ("d", "b") in tick(driver)


def test_a_long_prompt_that_fits_goes_to_the_most_free_blocks_at_once() -> None:
    loads = busy() | {"d": {"num_used_blocks": 30, "num_running": 9}}
    assert place(make_driver("long_context", loads), num_blocks=LONG) == "d"


def test_short_prompts_are_packed_so_that_others_keep_room() -> None:
    driver = make_driver("long_context", {"a": {"num_used_blocks": 30, "num_running": 1}, "b": {}})
    assert place(driver, "r1") == "a"
    # Until freeness falls below the packing limit.
    report(driver, "a", {"num_used_blocks": 70, "num_running": 3, "received_request_ids": ("r1",)})
    assert place(driver, "r2") == "b"


def test_an_instance_with_a_long_prefill_ahead_is_avoided() -> None:
    stalled = {"num_used_blocks": 20, "num_running": 1, "num_prefill_tokens_pending": 50_000}
    driver = make_driver(
        "long_context", {"a": stalled, "b": {"num_used_blocks": 75, "num_running": 2}}
    )
    assert place(driver) == "b"


def test_an_idle_instance_admits_any_long_prompt_that_it_can_hold() -> None:
    assert place(make_driver("long_context", {"a": {}}), num_blocks=100) == "a"


def test_without_a_held_long_prompt_it_balances_by_freeness() -> None:
    driver = make_driver("long_context", {"a": {"num_used_blocks": 95, "num_running": 9}, "b": {}})
    assert tick(driver) == [("a", "b")]
