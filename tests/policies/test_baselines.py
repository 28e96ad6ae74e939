"""Round-robin, random, power of two, least requests, INFaaS++: what each looks at, and no more."""

from __future__ import annotations

from collections import Counter

from llumsched.core.events import DrainRequested
from tests.policies.clusters import bundle_named, make_driver, place

LOADS = {
    "a": {"num_used_blocks": 90, "num_running": 2},
    "b": {"num_used_blocks": 10, "num_running": 9},
    "c": {"num_used_blocks": 20, "num_running": 4},
}


def test_round_robin_takes_turns_whatever_the_load() -> None:
    driver = make_driver("round_robin", LOADS)
    assert [place(driver, f"r{i}") for i in range(4)] == ["a", "b", "c", "a"]
    driver.handle(DrainRequested(instance_id="b"))
    assert [place(driver, f"s{i}") for i in range(3)] == ["c", "a", "c"]


def test_random_spreads_evenly_and_repeats_with_its_seed() -> None:
    runs = []
    for _ in range(2):
        driver = make_driver("random", LOADS)
        runs.append([place(driver, f"r{i}") for i in range(90)])
    assert runs[0] == runs[1]
    assert min(Counter(runs[0])[i] for i in "abc") > 15


def test_power_of_two_takes_the_less_loaded_of_two() -> None:
    loads = {"a": {"num_running": 99, "num_used_blocks": 1}, "b": {}}
    driver = make_driver("power_of_two", loads)
    placed = Counter(place(driver, f"r{i}") for i in range(80))
    # The loaded one is chosen only when it is drawn twice: about one time in four.
    assert 5 < placed["a"] < 35


def test_least_requests_counts_requests_not_blocks() -> None:
    driver = make_driver("least_requests", LOADS)
    assert [place(driver, f"r{i}") for i in range(4)] == ["a", "a", "a", "c"]


def test_infaas_has_no_migration() -> None:
    bundle = bundle_named("infaas")
    assert bundle.migration is None
    assert bundle.scaling is not None
