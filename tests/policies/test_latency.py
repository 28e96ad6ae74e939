"""Llumnix: freeness dispatch, balancing, de-fragmentation, priorities, draining, scaling."""

from __future__ import annotations

from typing import Any

import pytest

from llumsched.core.events import DrainRequested, RequestFinished, ScaleRequested
from llumsched.core.params import ParamError
from llumsched.core.policy import MigrationCandidate, PolicyBundle, ScaleDown, ScaleUp, settled
from llumsched.core.types import PriorityClass
from llumsched.policies.freeness import Freeness
from llumsched.policies.freeness_pairs import FreenessPairs
from llumsched.policies.freeness_range import FreenessRange
from llumsched.policies.low_priority_short import LowPriorityShort
from llumsched.policies.moving_quantile import MovingQuantile
from tests.core.builders import Driver, make_request
from tests.policies.clusters import bundle_named, make_driver, pairs, place, tick


def test_the_freest_is_chosen_by_steps_left_not_by_blocks_left() -> None:
    driver = make_driver(
        "latency",
        {
            "a": {"num_used_blocks": 40, "num_running": 12},  # 60 blocks for 12: 5 steps
            "b": {"num_used_blocks": 70, "num_running": 3},  # 30 blocks for 3: 10 steps
        },
    )
    assert place(driver) == "b"


def test_an_instance_running_a_high_priority_request_looks_full() -> None:
    driver = make_driver(
        "latency",
        {
            "a": {"num_used_blocks": 5, "num_running_by_class": ((1, 1),)},
            "b": {"num_used_blocks": 50, "num_running": 3, "num_running_by_class": ((0, 3),)},
        },
    )
    assert place(driver) == "b"


def test_headroom_holds_from_the_moment_of_dispatch() -> None:
    driver = make_driver("latency", {"a": {}, "b": {"num_used_blocks": 50, "num_running": 2}})
    assert place(driver, "h", execution_priority=PriorityClass.HIGH) == "a"
    assert place(driver, "n") == "b"


@pytest.mark.parametrize("room_first", [True, False])
@pytest.mark.parametrize("queue", ["head_of_line", "whole"])
def test_what_is_kept_clear_for_high_priority_is_open_to_it(queue: str, room_first: bool) -> None:
    dispatch = Freeness(queue=queue, room_first=room_first)
    loads: dict[str, dict[str, Any]] = {
        "clear": {"num_used_blocks": 5, "num_running": 1, "num_running_by_class": ((1, 1),)},
        "full": {"num_used_blocks": 70, "num_running": 5, "num_running_by_class": ((0, 5),)},
    }
    driver = make_driver(PolicyBundle(name="t", dispatch=dispatch), loads)
    assert place(driver, "high", execution_priority=PriorityClass.HIGH) == "clear"
    assert place(driver, "normal") == "full"


def test_the_whole_queue_counts_if_asked_for() -> None:
    loads = {
        "a": {
            "num_used_blocks": 60,
            "num_running": 4,
            "num_waiting": 8,
            "head_of_line_blocks": 1,
            "num_waiting_blocks": 80,
        },
        "b": {"num_used_blocks": 70, "num_running": 4},
    }
    assert place(make_driver(bundle_named("freeness", room_first=False), loads)) == "a"
    assert place(make_driver("infaas", loads)) == "b"


def test_an_instance_with_room_comes_before_one_where_the_prompt_would_wait() -> None:
    """Headroom for a high-priority request is no reason to let others queue elsewhere."""
    loads: dict[str, dict[str, Any]] = {
        "high": {"num_used_blocks": 30, "num_running": 5, "num_running_by_class": ((1, 1),)},
        "full": {"num_used_blocks": 99, "num_running": 5},
    }
    assert place(make_driver(bundle_named("freeness", room_first=False), loads), num_blocks=2) == (
        "full"
    )
    assert place(make_driver("latency", loads), num_blocks=2) == "high"
    assert place(make_driver("latency", loads), num_blocks=1) == "full"


def test_without_room_anywhere_the_shortest_queue_is_chosen() -> None:
    """A deficit shared by more requests is not a smaller one."""
    loads = {
        "short": {
            "num_used_blocks": 95,
            "num_running": 2,
            "num_waiting": 1,
            "head_of_line_blocks": 10,
            "num_waiting_blocks": 10,
        },
        "long": {
            "num_used_blocks": 95,
            "num_running": 10,
            "num_waiting": 6,
            "head_of_line_blocks": 10,
            "num_waiting_blocks": 60,
        },
    }
    assert place(make_driver(bundle_named("freeness", room_first=False), loads)) == "long"
    assert place(make_driver("latency", loads)) == "short"


def test_the_least_free_is_paired_with_the_freest() -> None:
    driver = make_driver(
        "latency",
        {
            "a": {"num_used_blocks": 90, "num_running": 10},
            "b": {"num_used_blocks": 80, "num_running": 10},
            "c": {"num_used_blocks": 10, "num_running": 1},
            "d": {"num_used_blocks": 20, "num_running": 1},
            "e": {"num_used_blocks": 50, "num_running": 4},  # between the thresholds
        },
    )
    assert pairs(FreenessPairs(), driver.cluster) == [("a", "c"), ("b", "d")]
    assert tick(driver) == [("a", "c"), ("b", "d")]


def test_a_prompt_stuck_at_the_head_of_a_queue_moves_others_away() -> None:
    roomy = {"num_used_blocks": 40, "num_running": 3}
    stuck = roomy | {"num_waiting": 1, "head_of_line_blocks": 70, "num_waiting_blocks": 70}
    assert tick(make_driver("latency", {"a": roomy, "b": {}})) == []
    assert tick(make_driver("latency", {"a": stuck, "b": {}})) == [("a", "b")]


def test_a_draining_instance_is_emptied_first_and_below_the_usual_threshold() -> None:
    driver = make_driver(
        "latency",
        {
            "a": {"num_used_blocks": 10, "num_running": 1},
            "b": {"num_used_blocks": 40, "num_running": 4},  # freeness 15
        },
    )
    assert tick(driver) == []
    driver.handle(DrainRequested(instance_id="a"))
    assert tick(driver) == [("a", "b")]


def test_one_threshold_must_not_be_used_for_both_ends() -> None:
    with pytest.raises(ParamError, match="two instances exchange requests for ever"):
        FreenessPairs(source_below=10, destination_above=5)


# Which request moves.


def candidate(request_id: str, num_blocks: int, **changes: int | float) -> MigrationCandidate:
    return MigrationCandidate(request_id=request_id, num_blocks=num_blocks, **changes)  # type: ignore[arg-type]


def test_low_priority_moves_first_then_short() -> None:
    chosen = LowPriorityShort().choose(
        [
            candidate("high", 1, execution_priority=1),
            candidate("long", 50),
            candidate("short", 2),
        ]
    )
    assert [c.request_id for c in chosen] == ["short", "long", "high"]


def test_a_request_predicted_to_end_soon_moves_last() -> None:
    chosen = LowPriorityShort(min_remaining_tokens=64).choose(
        [
            candidate("ends soon", 1, num_output_tokens=90, predicted_output_tokens=100),
            candidate("goes on", 5, num_output_tokens=90, predicted_output_tokens=500),
            candidate("overran", 9, num_output_tokens=90, predicted_output_tokens=50),
        ]
    )
    assert [c.request_id for c in chosen] == ["goes on", "overran", "ends soon"]


def test_a_request_that_has_just_moved_stays() -> None:
    candidates = [candidate("new", 1), candidate("moved", 1, since_migration_s=1.0)]
    assert [c.request_id for c in settled(candidates, 5.0)] == ["new"]
    assert len(settled(candidates, 1.0)) == 2


# Scaling.


def test_average_freeness_outside_the_range_scales() -> None:
    policy = FreenessRange(low=10, high=60)
    full = make_driver("latency", {"a": {"num_used_blocks": 90, "num_running": 5}})
    wish = policy.scale(full.cluster)
    assert wish == ScaleUp(num_instances=1, reason="average freeness 2.0 < 10")
    idle = make_driver("latency", {"a": {"num_used_blocks": 9, "num_running": 1}, "b": {}})
    assert policy.scale(idle.cluster) == ScaleDown(
        instance_id="b", reason="average freeness 191.0 > 60"
    )
    full.handle(ScaleRequested(num_instances=2))
    assert policy.scale(full.cluster) is None  # help is on its way
    inside = make_driver("latency", {"a": {"num_used_blocks": 50, "num_running": 2}})
    assert policy.scale(inside.cluster) is None


def test_what_waits_decides_how_many_are_missing_and_an_empty_instance_is_kept_for_it() -> None:
    """An instance that has just booted is the freest by far, and is not drained for that."""
    policy = FreenessRange(low=10, high=60)
    full = {"num_used_blocks": 100, "num_running": 5, "num_waiting": 10, "num_waiting_blocks": 400}
    behind = make_driver("latency", {"a": full})
    assert policy.scale(behind.cluster) == ScaleUp(
        num_instances=6, reason="average freeness -26.7 < 10"
    )
    driver = make_driver("latency", {"a": full, "b": {}, "c": {}, "d": {}, "e": {}, "f": {}})
    wish = policy.scale(driver.cluster)
    assert wish == ScaleUp(num_instances=1, reason="average freeness 6.7 < 10")
    driver.join("g")
    assert policy.scale(driver.cluster) is None


def test_what_the_scheduler_holds_counts_as_what_waits_at_an_instance_does() -> None:
    driver = make_driver("late_binding", {"a": {"num_used_blocks": 70, "num_running": 2}})
    policy = FreenessRange(low=10, high=60)
    assert policy.scale(driver.cluster) is None
    assert place(driver, "long", num_blocks=50) is None
    assert policy.scale(driver.cluster) == ScaleUp(
        num_instances=1, reason="average freeness -6.7 < 10"
    )


def test_scaling_looks_at_the_freeness_of_normal_priority() -> None:
    driver = make_driver(
        "latency", {"a": {"num_used_blocks": 50, "num_running_by_class": ((1, 1),)}}
    )
    assert driver.cluster["a"].freeness < 10
    assert FreenessRange().scale(driver.cluster) is None


def test_the_last_instance_is_not_needed_while_nothing_runs() -> None:
    """The scheduler says whether the last may go, so few blocks that it is never free to spare."""
    policy = FreenessRange(low=10, high=60)
    unneeded = ScaleDown(instance_id="a", reason="nothing runs")
    for num_blocks in (5, 30, 1000):
        idle = Driver()
        idle.join("a", num_total_blocks=num_blocks)
        assert policy.scale(idle.cluster) == unneeded
    busy = make_driver("latency", {"a": {"num_used_blocks": 1}})
    assert policy.scale(busy.cluster) is None
    driver = make_driver("latency", {"a": {}, "b": {"num_used_blocks": 1}})
    driver.handle(DrainRequested(instance_id="b"))
    assert policy.scale(driver.cluster) is None, "what drains may still need its place"


def test_an_empty_cluster_grows_only_for_requests() -> None:
    empty = Driver()
    assert FreenessRange().scale(empty.cluster) is None
    empty.arrive("r")
    assert isinstance(FreenessRange().scale(empty.cluster), ScaleUp)


# Length prediction.


def test_prediction_follows_the_client_and_falls_back_to_everyone() -> None:
    predictor = MovingQuantile(quantile=0.5, min_samples=3, window=5)
    assert predictor.predict(make_request(client_id="x")) is None
    for num_tokens in (10, 20, 30, 400, 500):
        predictor.observe(make_request(client_id="x" if num_tokens < 100 else "y"), num_tokens)
    assert predictor.predict(make_request(client_id="x")) == 20
    assert predictor.predict(make_request(client_id="new")) == 30
    for _ in range(5):
        predictor.observe(make_request(client_id="x"), 1000)
    assert predictor.predict(make_request(client_id="x")) == 1000


def test_the_predictor_forgets_the_client_longest_unseen() -> None:
    predictor = MovingQuantile(min_samples=1, max_clients=2, window=2)
    for client_id, num_tokens in (("x", 1), ("y", 2), ("x", 1), ("z", 3)):
        predictor.observe(make_request(client_id=client_id), num_tokens)
    assert predictor.predict(make_request(client_id="x")) == 1
    assert predictor.predict(make_request(client_id="y")) == 3  # everyone's last two: 1 and 3
    assert len(predictor.state()["clients"]) == 2


def test_dispatch_avoids_the_instance_whose_requests_will_grow() -> None:
    bundle = PolicyBundle(name="test", dispatch=Freeness(), predictor=MovingQuantile(min_samples=1))
    without = PolicyBundle(name="test", dispatch=Freeness())
    placed = []
    for chosen in (bundle, without):
        driver = make_driver(chosen, {"a": {}, "b": {}})
        for client_id, num_tokens in (("long", 1000), ("short", 10)):
            driver.arrive(f"learn {client_id}", client_id=client_id)
            driver.handle(
                RequestFinished(request_id=f"learn {client_id}", num_output_tokens=num_tokens)
            )
        assert place(driver, "r1", client_id="long") == "a"
        assert place(driver, "r2", client_id="short", num_blocks=5) == "b"
        placed.append(place(driver, "r3", client_id="short"))
    assert placed == ["b", "a"]


def test_a_prediction_never_exceeds_what_the_request_allows() -> None:
    predictor = MovingQuantile(min_samples=1)
    predictor.observe(make_request(), 1000)
    driver = Driver(PolicyBundle(name="test", dispatch=Freeness(), predictor=predictor))
    driver.join("a")
    (action,) = driver.arrive("r", max_output_tokens=16)
    assert action.predicted_output_tokens == 16  # type: ignore[union-attr]
    assert driver.cluster.columns.predicted_final_blocks[0] == 2
