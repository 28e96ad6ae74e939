"""Deadlines: place by predicted slack, move away from a predicted miss, reject early."""

from __future__ import annotations

from llumsched.core.actions import RejectRequest
from tests.policies.clusters import make_driver, place, tick

STEP = {"num_used_blocks": 10, "num_running": 2}


def test_a_short_queue_beats_free_memory_for_the_first_token() -> None:
    driver = make_driver(
        "slo",
        {
            "a": STEP | {"num_prefill_tokens_pending": 8000},
            "b": STEP | {"num_used_blocks": 80},
        },
    )
    assert place(driver) == "b"


def test_waiting_for_blocks_counts_as_time() -> None:
    driver = make_driver(
        "slo",
        {
            "a": STEP | {"num_used_blocks": 95},
            "b": STEP | {"num_prefill_tokens_pending": 1000},
        },
    )
    assert place(driver, num_blocks=40) == "b"


def test_a_request_that_no_instance_can_serve_in_time_is_rejected_at_once() -> None:
    busy = STEP | {"num_prefill_tokens_pending": 40_000}
    driver = make_driver("slo", {"a": busy, "b": busy})
    (action,) = driver.arrive("r", ttft_slo_s=2.0)
    assert isinstance(action, RejectRequest)
    assert "no instance can meet the deadlines: predicted first token in" in action.reason
    assert "(deadline 2 s)" in action.reason
    assert action.retry_after_s is not None
    assert 1.0 <= action.retry_after_s <= 60.0


def test_one_that_can_is_enough_and_patience_is_served() -> None:
    busy = STEP | {"num_prefill_tokens_pending": 40_000}
    assert place(make_driver("slo", {"a": busy, "b": STEP}), ttft_slo_s=2.0) == "b"
    assert place(make_driver("slo", {"a": busy}), ttft_slo_s=60.0) == "a"


def test_the_deadline_per_token_counts_too() -> None:
    slow, fast = STEP | {"step_time_s": 0.2}, STEP | {"step_time_s": 0.05}
    assert place(make_driver("slo", {"a": slow, "b": fast}), tpot_slo_s=0.1) == "b"
    (action,) = make_driver("slo", {"a": slow}).arrive("r", tpot_slo_s=0.1)
    assert isinstance(action, RejectRequest)


def test_requests_move_away_from_a_predicted_miss() -> None:
    slow = {"num_used_blocks": 60, "num_running": 20, "step_time_s": 0.2}
    fast = {"num_used_blocks": 10, "num_running": 2, "step_time_s": 0.05}
    assert tick(make_driver("slo", {"a": slow, "b": fast})) == [("a", "b")]
    assert tick(make_driver("slo", {"a": fast, "b": fast})) == []
    assert tick(make_driver("slo", {"a": slow, "b": slow})) == []
