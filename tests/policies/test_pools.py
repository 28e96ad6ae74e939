"""Prefill and decode apart: disaggregated, DistServe, Splitwise, TetriInfer, MemServe, Mooncake."""

from __future__ import annotations

from typing import Any

import pytest

from llumsched.core.actions import RejectRequest
from llumsched.core.events import DrainRequested, InstanceLost, KvBlocksStored
from llumsched.core.policy import MigrationCandidate, Placement
from llumsched.core.types import InstanceRole
from llumsched.policies.after_first_token import AfterFirstToken
from llumsched.policies.mooncake import EarlyRejection
from llumsched.policies.tetriinfer import PredictedPowerOfTwo
from tests.core.builders import Driver, make_request
from tests.policies.clusters import bundle_named, make_driver, pairs, place, tick

SPLIT = ["disaggregated", "distserve", "splitwise", "tetriinfer", "memserve", "mooncake"]
BUSY = {"num_used_blocks": 40, "num_running": 4}


def four(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Two prefill instances, a and b, and two for decode, c and d."""
    return {name: dict(BUSY) | changes.get(name, {}) for name in "abcd"}


@pytest.mark.parametrize("bundle", SPLIT)
def test_prompts_go_to_the_prefill_pool_and_then_move_to_the_decode_pool(bundle: str) -> None:
    driver = make_driver(bundle, four())
    assert {place(driver, f"r{i}", num_blocks=2) for i in range(4)} <= {"a", "b"}
    moved = tick(driver)
    assert {source for source, _ in moved} == {"a", "b"}
    assert {destination for _, destination in moved} <= {"c", "d"}


@pytest.mark.parametrize("bundle", SPLIT)
def test_instances_with_a_role_keep_it(bundle: str) -> None:
    roles = {
        "a": {"role": InstanceRole.DECODE},
        "b": {"role": InstanceRole.DECODE},
        "c": {"role": InstanceRole.PREFILL},
        "d": {"role": InstanceRole.PREFILL},
    }
    driver = make_driver(bundle, four(**roles))
    assert place(driver, num_blocks=2) in {"c", "d"}
    assert {source for source, _ in tick(driver)} == {"c", "d"}


@pytest.mark.parametrize("bundle", SPLIT)
def test_a_pool_that_dies_out_is_replaced_by_the_other(bundle: str) -> None:
    driver = make_driver(bundle, four())
    for instance_id in "abc":
        driver.handle(InstanceLost(instance_id=instance_id))
    assert place(driver, num_blocks=2) == "d"
    assert tick(driver) == []


@pytest.mark.parametrize("bundle", SPLIT)
def test_a_draining_instance_is_emptied_whatever_its_pool(bundle: str) -> None:
    driver = make_driver(bundle, four())
    driver.handle(DrainRequested(instance_id="d"))
    assert "d" in {source for source, _ in tick(driver)}


def test_only_requests_past_their_first_token_are_handed_over() -> None:
    candidates = [
        MigrationCandidate(request_id="in prefill", num_blocks=9),
        MigrationCandidate(request_id="just done", num_blocks=9, num_output_tokens=1),
        MigrationCandidate(request_id="waits longer", num_blocks=9, num_output_tokens=7),
    ]
    chosen = AfterFirstToken().choose(candidates)
    assert [c.request_id for c in chosen] == ["waits longer", "just done"]


# disaggregated: lending, both ways.

LONG_QUEUE = {"num_prefill_tokens_pending": 20_000}


def test_an_idle_decode_instance_helps_when_every_prefill_queue_is_long() -> None:
    assert place(make_driver("disaggregated", four(a=LONG_QUEUE))) == "b"
    both = four(a=LONG_QUEUE, b=LONG_QUEUE)
    assert place(make_driver("disaggregated", both)) in {"c", "d"}
    assert place(make_driver("distserve", both)) in {"a", "b"}


def test_an_idle_prefill_instance_takes_decodes_when_the_decode_pool_is_full() -> None:
    full = {"num_used_blocks": 97, "num_running": 9}
    idle: dict[str, Any] = {"num_used_blocks": 0, "num_running": 0}
    driver = make_driver("disaggregated", four(a=idle, b=idle | LONG_QUEUE, c=full, d=full))
    assert {destination for _, destination in tick(driver)} == {"a"}


def test_decodes_stay_on_prefill_instances_while_the_decode_pool_is_full() -> None:
    full = {"num_used_blocks": 97, "num_running": 9}
    driver = make_driver("disaggregated", four(a=LONG_QUEUE, b=LONG_QUEUE, c=full, d=full))
    assert tick(driver) == []


# Splitwise.


def test_past_the_threshold_prompts_spill_into_the_mixed_then_the_token_pool() -> None:
    # Of eight instances a-c are the prompt pool, d and e the mixed, f-h the token pool.
    loads = {name: dict(BUSY) for name in "abcdefgh"}
    assert place(make_driver("splitwise", loads)) in {"a", "b", "c"}
    loads |= dict.fromkeys("abc", BUSY | LONG_QUEUE)
    assert place(make_driver("splitwise", loads)) in {"d", "e"}
    loads |= dict.fromkeys("de", BUSY | LONG_QUEUE)
    assert place(make_driver("splitwise", loads)) in {"f", "g", "h"}


def test_requests_stay_in_the_mixed_pool_and_token_overflow_goes_there() -> None:
    loads = {name: dict(BUSY) for name in "abcdefgh"}
    moved = tick(make_driver("splitwise", loads))
    assert {source for source, _ in moved} == set("abc")
    assert {destination for _, destination in moved} <= set("fgh")
    full = {"num_used_blocks": 99, "num_running": 9}
    moved = tick(make_driver("splitwise", loads | dict.fromkeys("fgh", full)))
    assert {destination for _, destination in moved} <= set("de")


# TetriInfer.


def test_of_two_decode_instances_the_one_predicted_lighter_is_chosen() -> None:
    driver = make_driver("tetriinfer", four())
    # What c runs will grow more, although d has more blocks in use now.
    driver.report("c", num_used_blocks=20, num_running=4)
    driver.scheduler._cluster.add_predicted(driver.scheduler._cluster.records["c"], 300)
    driver.scheduler._cluster.add_predicted(driver.scheduler._cluster.records["d"], 50)
    chosen = [pairs(PredictedPowerOfTwo(), driver.cluster) for _ in range(20)]
    by_destination = [destination for both in chosen for _, destination in both]
    # c only when both draws fall on it.
    assert by_destination.count("d") > 2 * by_destination.count("c") > 0
    driver.scheduler._cluster.add_predicted(driver.scheduler._cluster.records["c"], -300)
    driver.scheduler._cluster.add_predicted(driver.scheduler._cluster.records["d"], -50)


# MemServe and Mooncake.

PROMPT = tuple(range(100, 140))


def cached(driver: Driver, instance_id: str, num_blocks: int) -> None:
    hashes = PROMPT[:num_blocks]
    driver.handle(KvBlocksStored(instance_id=instance_id, block_hashes=hashes))


def test_memserve_follows_the_prompt_tree_whatever_the_load() -> None:
    driver = make_driver("memserve", four(a=LONG_QUEUE))
    cached(driver, "a", 30)
    cached(driver, "b", 10)
    cached(driver, "c", 40)  # a decode instance
    assert place(driver, num_blocks=40, prefix_hashes=PROMPT) == "a"


def test_mooncake_weighs_the_cache_against_the_queue() -> None:
    driver = make_driver("mooncake", four())
    cached(driver, "b", 30)
    assert place(driver, "r1", num_blocks=40, prefix_hashes=PROMPT) == "b"
    driver = make_driver("mooncake", four(b=LONG_QUEUE))
    cached(driver, "b", 30)
    assert place(driver, "r1", num_blocks=40, prefix_hashes=PROMPT) == "a"


def test_mooncake_rejects_early_when_the_predicted_decode_load_is_over_the_bound() -> None:
    crowded = {"num_running": 90, "max_num_seqs": 100}
    driver = make_driver("mooncake", four(c=crowded, d=crowded, a={"num_running": 30}))
    (action,) = driver.arrive("r")
    assert isinstance(action, RejectRequest)
    assert "predicted decode load" in action.reason
    assert action.retry_after_s is not None


def test_mooncake_counts_what_will_have_left_the_decode_pool_by_then() -> None:
    crowded = {"num_running": 90, "max_num_seqs": 100}
    loads = four(c=crowded, d=crowded, a={"num_running": 20})
    now = make_driver("mooncake", loads)
    later = make_driver(
        "mooncake",
        {name: load | LONG_QUEUE for name, load in loads.items() if name in "ab"}
        | {name: loads[name] for name in "cd"},
    )
    policy = EarlyRejection()
    assert "predicted decode load" in str(policy.admit(make_request(), now.cluster))
    # The prefill takes seconds, in which many of the decodes end.
    assert "predicted decode load" not in str(policy.admit(make_request(), later.cluster))


# Dynamo.


def test_dynamo_adds_prefill_left_to_compute_and_decode_blocks() -> None:
    loads: dict[str, dict[str, Any]] = {
        "a": {"num_used_blocks": 30, "num_running": 1},
        "b": {"num_used_blocks": 10, "num_running": 1, "num_prefill_tokens_pending": 10 * 16},
    }
    assert place(make_driver(bundle_named("dynamo"), loads)) == "b"
    assert place(make_driver(bundle_named("dynamo", overlap_weight=3.0), loads)) == "a"


def test_dynamo_draws_with_a_temperature() -> None:
    loads: dict[str, dict[str, Any]] = {"a": {"num_used_blocks": 30, "num_running": 1}, "b": {}}
    cold = make_driver(bundle_named("dynamo"), loads)
    hot = make_driver(bundle_named("dynamo", temperature=5.0), loads)
    policy = cold.scheduler.bundle.dispatch
    hot_policy = hot.scheduler.bundle.dispatch
    drawn = [hot_policy.dispatch(make_request(), hot.cluster) for _ in range(50)]
    assert {p.instance_id for p in drawn if isinstance(p, Placement)} == {"a", "b"}
    settled = [policy.dispatch(make_request(), cold.cluster) for _ in range(50)]
    assert {p.instance_id for p in settled if isinstance(p, Placement)} == {"b"}
