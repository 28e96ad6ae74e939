"""Fill to a target, hold rather than preempt, consolidate, let idle instances go."""

from __future__ import annotations

from llumsched.core.actions import DispatchRequest
from llumsched.core.policy import ScaleDown, ScaleUp
from llumsched.policies.throughput import Consolidate, SpareInstances
from tests.core.builders import Driver
from tests.policies.clusters import make_driver, pairs, place, report


def test_the_fullest_instance_within_the_target_is_filled_first() -> None:
    driver = make_driver(
        "throughput",
        {
            "a": {"num_used_blocks": 30, "num_running": 3},
            "b": {"num_used_blocks": 60, "num_running": 3},
            "c": {},
        },
    )
    assert [place(driver, f"r{i}", num_blocks=10) for i in range(3)] == ["b", "b", "a"]


def test_the_batch_has_a_target_too() -> None:
    driver = make_driver(
        "throughput",
        {
            "a": {"num_used_blocks": 5, "num_running": 1},
            "b": {"num_used_blocks": 9, "num_running": 9, "max_num_seqs": 10},
        },
    )
    assert place(driver) == "a"


def test_a_request_is_held_while_it_would_cause_preemption() -> None:
    nearly_full = {"num_used_blocks": 70, "num_running": 4}  # 30 free, 4 blocks of growth each
    driver = make_driver("throughput", {"a": nearly_full})
    assert place(driver, "r1", num_blocks=20) is None
    assert place(driver, "r2", num_blocks=1) is None  # first come, first served
    actions = report(driver, "a", {"num_used_blocks": 40, "num_running": 2})
    assert [a.request_id for a in actions if isinstance(a, DispatchRequest)] == ["r1", "r2"]


def test_an_empty_instance_takes_what_fits_it() -> None:
    assert place(make_driver("throughput", {"a": {}}), num_blocks=99) == "a"


def test_the_emptiest_instance_is_emptied_into_the_fullest_with_room() -> None:
    loads = {
        "a": {"num_used_blocks": 15, "num_running": 3},
        "b": {"num_used_blocks": 50, "num_running": 5},
        "c": {"num_used_blocks": 70, "num_running": 7},
        "d": {"num_used_blocks": 84, "num_running": 7},
    }
    assert pairs(Consolidate(), make_driver("throughput", loads).cluster) == [("a", "c")]


def test_nothing_moves_when_the_others_could_not_take_it_all() -> None:
    loads = {
        "a": {"num_used_blocks": 35, "num_running": 3},
        "b": {"num_used_blocks": 70, "num_running": 5},
    }
    assert pairs(Consolidate(), make_driver("throughput", loads).cluster) == []


def test_two_equally_empty_instances_do_not_exchange_their_work() -> None:
    loads = {name: {"num_used_blocks": 20, "num_running": 2} for name in ("a", "b")}
    assert pairs(Consolidate(), make_driver("throughput", loads).cluster) == [("a", "b")]
    loads["b"]["num_used_blocks"] = 30
    assert pairs(Consolidate(), make_driver("throughput", loads).cluster) == [("a", "b")]


def test_scaling_follows_what_is_held_and_what_is_idle() -> None:
    policy = SpareInstances()
    driver = Driver()
    driver.arrive("r")
    assert isinstance(policy.scale(driver.cluster), ScaleUp)
    loads = {"a": {"num_used_blocks": 9, "num_running": 1}, "b": {}, "c": {}}
    idle = make_driver("throughput", loads).cluster
    assert policy.scale(idle) == ScaleDown(instance_id="c", reason="it runs nothing")
    assert SpareInstances(num_spare=2).scale(idle) is None
