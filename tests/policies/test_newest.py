"""The newest published systems: what each goes by, in the smallest cluster that shows it."""

from __future__ import annotations

import pytest

from llumsched.core.actions import DispatchRequest, StartMigration
from llumsched.core.events import KvBlocksStored, Ticked
from llumsched.core.types import SchedulingRequest
from llumsched.policies.calibrated_bound import CalibratedBound
from llumsched.policies.dualmap import candidate_rows
from llumsched.policies.hazard_rate import HazardRate
from tests.core.builders import Driver, make_request
from tests.policies.clusters import bundle_named, make_driver, place, report, tick

# Instances have 100 blocks of 16 tokens.
QUIET = {"num_used_blocks": 20, "num_running": 4, "step_time_s": 0.04}
PREFIX = tuple(range(700, 720))


# Llumnix


def test_llumnix_counts_the_head_of_a_queue_alone() -> None:
    queue = {"num_waiting": 5, "head_of_line_blocks": 1, "num_waiting_blocks": 80}
    loads = {"a": QUIET | queue, "b": QUIET | {"num_used_blocks": 30}}
    assert place(make_driver("llumnix", loads)) == "a"
    assert place(make_driver("infaas", loads)) == "b"


def test_llumnix_has_one_threshold() -> None:
    loads = {
        "a": {"num_used_blocks": 62, "num_running": 4, "victim_blocks": 5},
        "b": {"num_used_blocks": 40, "num_running": 4},
    }
    # 9.5 and 15 blocks a request: on the two sides of 10, but between the thresholds of `latency`.
    assert tick(make_driver("llumnix", loads), 0.2) == [("a", "b")]
    assert tick(make_driver("latency", loads)) == []


# llm-d


def test_llm_d_weighs_prefix_against_cache_use_and_queue() -> None:
    loads = {"a": QUIET, "b": QUIET | {"num_used_blocks": 70}}
    driver = make_driver("llm_d", loads)
    driver.handle(KvBlocksStored(instance_id="b", block_hashes=PREFIX))
    # 3 for the whole prefix, against 2 x 0.5 for the freer cache.
    assert place(driver, "warm", num_blocks=20, prefix_hashes=PREFIX) == "b"
    queued = loads | {"b": loads["b"] | {"num_waiting": 3, "num_waiting_blocks": 3}}
    driver = make_driver("llm_d", queued)
    driver.handle(KvBlocksStored(instance_id="b", block_hashes=PREFIX))
    # The queue takes 2 more.
    half = (*PREFIX[:8], *range(12))
    assert place(driver, "half", num_blocks=20, prefix_hashes=half) == "a"


def test_llm_d_spreads_cold_prompts_by_who_had_one_last() -> None:
    driver = make_driver("llm_d", dict.fromkeys("abc", QUIET))
    placed = [place(driver, f"r{number}", num_blocks=1) for number in range(6)]
    assert sorted(placed[:3]) == sorted(placed[3:]) == ["a", "b", "c"]  # type: ignore[type-var]


def test_llm_d_remembers_over_a_checkpoint() -> None:
    policy = bundle_named("llm_d").dispatch
    driver = make_driver("llm_d", dict.fromkeys("abc", QUIET))
    place(driver, num_blocks=1)
    state = driver.scheduler.bundle.dispatch.state()  # type: ignore[attr-defined]
    policy.restore(state)  # type: ignore[attr-defined]
    assert policy.state() == state == {"last_cold": {"a": 1}, "num_cold": 1}  # type: ignore[attr-defined]


# DualMap


def rows_of(driver: Driver, *hashes: int) -> tuple[int, ...]:
    request = make_request(num_blocks=max(1, len(hashes)), prefix_hashes=tuple(hashes))
    found = candidate_rows(request, driver.cluster, 8)
    assert found is not None
    return found


def test_dualmap_gives_prompts_that_begin_alike_the_same_two_instances() -> None:
    driver = make_driver("dualmap", {f"i{n}": QUIET for n in range(8)})
    pair = rows_of(driver, *PREFIX)
    assert len(set(pair)) == 2
    assert rows_of(driver, *PREFIX[:8], 1, 2, 3) == pair
    others = {rows_of(driver, *range(n, n + 8)) for n in range(0, 400, 10)}
    assert len(others) > 15
    assert {row for rows in others for row in rows} == set(range(8))


def test_dualmap_goes_by_the_cache_until_the_bound_would_be_missed() -> None:
    driver = make_driver("dualmap", {f"i{n}": QUIET for n in range(4)})
    first, second = rows_of(driver, *PREFIX)
    holder = f"i{second}"
    driver.handle(KvBlocksStored(instance_id=holder, block_hashes=PREFIX))
    report(driver, holder, QUIET | {"num_prefill_tokens_pending": 300})
    assert place(driver, "soon", num_blocks=20, prefix_hashes=PREFIX) == holder
    report(driver, holder, QUIET | {"num_prefill_tokens_pending": 30_000})
    assert place(driver, "late", num_blocks=20, prefix_hashes=PREFIX) == f"i{first}"


def test_dualmap_sends_what_waits_too_long_to_its_other_instance() -> None:
    driver = make_driver("dualmap", {f"i{n}": QUIET for n in range(4)})
    where = place(driver, "r", num_blocks=20, prefix_hashes=PREFIX)
    pair = [f"i{row}" for row in rows_of(driver, *PREFIX)]
    (other,) = set(pair) - {where}
    assert where is not None
    waiting = {"num_waiting": 2, "num_waiting_blocks": 40, "num_prefill_tokens_pending": 30_000}
    report(driver, where, QUIET | waiting | {"received_request_ids": ("r",)})
    assert tick(driver) == [(where, other)]


# MAPS


def with_lengths(driver: Driver, *lengths: int) -> None:
    for length in lengths:
        predictor = driver.scheduler.bundle.predictor
        assert predictor is not None
        predictor.observe(make_request(), length)


def test_maps_takes_the_shortest_queue_where_all_fit_to_the_end() -> None:
    loads = {
        "a": QUIET | {"num_used_blocks": 80},
        "b": QUIET | {"num_waiting": 2, "num_waiting_blocks": 2},
        "c": QUIET | {"num_waiting": 1, "num_waiting_blocks": 2},
    }
    driver = make_driver("maps", loads)
    with_lengths(driver, *[400] * 10)
    # 25 blocks of output and one of prompt: more than `a` has left.
    assert place(driver) == "c"


def test_maps_takes_the_most_memory_where_nothing_fits() -> None:
    full = {"num_running": 9, "step_time_s": 0.04}
    loads = {"a": full | {"num_used_blocks": 95}, "b": full | {"num_used_blocks": 90}}
    driver = make_driver("maps", loads)
    with_lengths(driver, *[400] * 10)
    assert place(driver) == "b"


def test_a_calibrated_bound_holds_as_often_as_it_says_where_lengths_grow() -> None:
    bound = CalibratedBound(coverage=0.9)
    request = make_request()
    num_below = num_told = 0
    for number in range(600):
        told = bound.predict(request)
        length = 100 + number // 2 + 37 * (number % 11)
        if told is not None:
            num_told += 1
            num_below += length <= told
        bound.observe(request, length)
    assert num_below / num_told > 0.88
    again = CalibratedBound(coverage=0.9)
    again.restore(bound.state())
    assert again.predict(request) == bound.predict(request)


# STAR


@pytest.mark.parametrize(
    ("lengths", "produced", "left"),
    [
        ([100] * 10, 0, 100),
        ([100] * 10, 40, 60),
        ([10] * 90 + [1000] * 10, 0, 109),
        # It has outlived the short ones.
        ([10] * 90 + [1000] * 10, 20, 980),
        # It has outlived all.
        ([10] * 100, 70, 70),
    ],
)
def test_what_is_left_follows_from_those_that_lasted_longer(
    lengths: list[int], produced: int, left: float
) -> None:
    predictor = HazardRate(window=1000)
    request = make_request()
    assert predictor.predict(request) is None
    for length in lengths:
        predictor.observe(request, length)
    assert predictor.predict_remaining(request, produced) == pytest.approx(left)
    again = HazardRate(window=1000)
    again.restore(predictor.state())
    assert again.predict_remaining(request, produced) == pytest.approx(left)


def test_a_client_has_lengths_of_its_own_and_its_limit_holds() -> None:
    predictor = HazardRate()
    for _ in range(8):
        predictor.observe(make_request(client_id="terse"), 10)
        predictor.observe(make_request(client_id="chatty"), 500)
    assert predictor.predict(make_request(client_id="terse")) == 10
    assert predictor.predict(make_request(client_id="chatty")) == 500
    limited = make_request(client_id="chatty", max_output_tokens=30)
    assert predictor.predict_remaining(limited, 20) == 10


def test_star_moves_the_request_that_evens_out_what_is_to_come() -> None:
    driver = make_driver("star", {"a": {}, "b": {"num_used_blocks": 90}})
    with_lengths(driver, *[2000] * 10)
    placed = [place(driver, name, num_blocks=blocks) for name, blocks in (("r1", 8), ("r2", 25))]
    assert placed == ["a", "a"]
    running = {"num_running": 2, "step_time_s": 0.05, "num_decode_steps": 1}
    progress = (("r1", 130, 3), ("r2", 402, 3))
    report(driver, "a", running | {"num_used_blocks": 35, "progress": progress})
    report(driver, "b", {})
    driver.now += 0.5
    actions = driver.handle(Ticked())
    moved = [(a.source, a.request_id) for a in actions if isinstance(a, StartMigration)]
    # In 5 s the two have 230 and 502 tokens: with the long one gone, `b` has 31 blocks; with the
    # short one gone, `a` has as many left. The first of equals goes.
    assert moved == [("a", "r1")]


def test_star_leaves_alone_what_is_about_to_end() -> None:
    driver = make_driver("star", {"a": {}, "b": {"num_used_blocks": 90}})
    with_lengths(driver, *[20] * 10)
    for name in ("r1", "r2"):
        place(driver, name, num_blocks=20)
    running = {"num_running": 2, "step_time_s": 0.05, "num_decode_steps": 1}
    # In five seconds both have ended: there is no load to come.
    progress = (("r1", 322, 3), ("r2", 322, 3))
    report(driver, "a", running | {"num_used_blocks": 42, "progress": progress})
    report(driver, "b", {})
    driver.now += 0.5
    assert not [a for a in driver.handle(Ticked()) if isinstance(a, StartMigration)]


# DynaServe


def test_dynaserve_plans_to_hand_over_to_the_emptier_instance() -> None:
    loads = {
        "a": QUIET | {"num_used_blocks": 50},
        "b": QUIET | {"num_used_blocks": 10, "num_prefill_tokens_pending": 900},
    }
    driver = make_driver("dynaserve", loads)
    assert place(driver, "unknown") == "a"
    with_lengths(driver, *[400] * 10)
    (sent,) = [a for a in driver.arrive("r") if isinstance(a, DispatchRequest)]
    assert sent.instance_id == "a"
    assert "to b after 118 tokens" in sent.reason
    progress = (("r", 134, 118),)
    report(driver, "a", loads["a"] | {"num_decode_steps": 5, "progress": progress})
    assert tick(driver, 0.3) == [("a", "b")]


def test_dynaserve_splits_neither_short_answers_nor_between_equals() -> None:
    equal = make_driver("dynaserve", dict.fromkeys("ab", QUIET))
    with_lengths(equal, *[400] * 10)
    short = make_driver("dynaserve", {"a": QUIET, "b": {}})
    with_lengths(short, *[100] * 10)
    for driver in (equal, short):
        (sent,) = [a for a in driver.arrive("r") if isinstance(a, DispatchRequest)]
        assert sent.reason.startswith("whole")


@pytest.mark.parametrize("name", ["llumnix", "llm_d", "dualmap", "maps", "star", "dynaserve"])
def test_each_places_in_an_empty_and_in_a_full_pool(name: str) -> None:
    full = {"num_used_blocks": 100, "num_running": 9, "num_waiting": 4, "num_waiting_blocks": 9}
    for load in ({}, full):
        assert place(make_driver(name, dict.fromkeys("ab", load)), num_blocks=4) in ("a", "b")


def test_candidates_are_none_where_nothing_accepts() -> None:
    driver = make_driver("dualmap", {"a": QUIET})
    cluster = driver.cluster
    request: SchedulingRequest = make_request(num_blocks=1000)
    assert candidate_rows(request, cluster, 8) is None
