"""The longest cached prefix wins, up to a bound of imbalance; the engines' events feed it."""

from __future__ import annotations

from typing import Any

import pytest

from llumsched.core.events import InstanceLost, KvBlocksRemoved, KvBlocksStored, KvCacheCleared
from tests.core.builders import Driver
from tests.policies.clusters import make_driver, place

PROMPT = tuple(range(100, 110))


def cached(driver: Driver, instance_id: str, num_blocks: int) -> None:
    hashes = PROMPT[:num_blocks]
    driver.handle(KvBlocksStored(instance_id=instance_id, block_hashes=hashes))


def make(loads: dict[str, dict[str, Any]] | None = None, bundle: str = "prefix_aware") -> Driver:
    driver = make_driver(bundle, loads or {"a": {}, "b": {}, "c": {}})
    cached(driver, "b", 8)
    cached(driver, "c", 3)
    return driver


def where(driver: Driver, request_id: str = "r") -> str | None:
    return place(driver, request_id, num_blocks=len(PROMPT), prefix_hashes=PROMPT)


@pytest.mark.parametrize("bundle", ["prefix_aware", "dynamo"])
def test_the_longest_cached_prefix_wins(bundle: str) -> None:
    assert where(make(bundle=bundle)) == "b"


def test_an_instance_past_the_imbalance_is_not_chosen_for_its_cache() -> None:
    driver = make({"a": {}, "b": {"num_running": 9, "num_used_blocks": 9}, "c": {}})
    assert where(driver) == "c"


def test_of_equal_matches_the_freest_is_chosen() -> None:
    driver = make({"a": {}, "b": {"num_running": 3, "num_used_blocks": 40}, "c": {}})
    cached(driver, "c", 8)
    assert where(driver) == "c"


def test_evicted_blocks_do_not_count() -> None:
    driver = make()
    driver.handle(KvBlocksRemoved(instance_id="b", block_hashes=PROMPT[2:]))
    assert where(driver, "r1") == "c"
    driver.handle(KvCacheCleared(instance_id="c"))
    assert where(driver, "r2") == "b"


def test_without_hashes_or_matches_it_is_the_freest() -> None:
    driver = make({"a": {}, "b": {"num_running": 1, "num_used_blocks": 9}, "c": {}})
    assert place(driver, "r1") == "a"
    assert place(driver, "r2", prefix_hashes=(1, 2, 3)) == "c"


def test_what_is_stored_by_an_instance_that_left_is_forgotten() -> None:
    driver = make()
    driver.handle(InstanceLost(instance_id="b"))
    driver.join("b")
    assert where(driver) == "c"
