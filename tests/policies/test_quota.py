"""Quotas of clients: what a minute admits, when the next comes, and that none is charged twice."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumsched.config import build_bundle, loads
from llumsched.core.actions import DispatchRequest, Rejection, RejectRequest
from llumsched.core.codec import decode_action, encode
from llumsched.core.policy import ADMIT, Reject
from llumsched.core.types import SchedulingRequest
from llumsched.policies.quota import Quota
from tests.core.builders import Driver
from tests.policies.clusters import make_driver

ONE = {"a": {"num_total_blocks": 1000, "num_free_blocks": 1000}}


def driver(**quota: Any) -> Driver:
    params = ", ".join(f"{name}: {value}" for name, value in quota.items())
    text = (
        f"{{policy: round_robin, parts: {{admission: {{name: quota, {params}}}}},"
        " scheduler: {stale_after_s: 1000.0}}"
    )
    return make_driver(build_bundle(loads(text)), ONE)


def ask(driver: Driver, request_id: str, client_id: str = "c", **fields: Any) -> Any:
    """The action that answers a request."""
    (action,) = driver.arrive(request_id, client_id=client_id, **fields)
    return action


def test_a_client_has_so_many_requests_a_minute_and_others_have_theirs() -> None:
    d = driver(requests_per_minute=2)
    assert isinstance(ask(d, "1"), DispatchRequest)
    assert isinstance(ask(d, "2"), DispatchRequest)
    rejected = ask(d, "3")
    assert isinstance(rejected, RejectRequest)
    assert rejected.rejection is Rejection.CLIENT_LIMIT
    assert rejected.retry_after_s == pytest.approx(30.0)
    assert isinstance(ask(d, "4", client_id="other"), DispatchRequest)
    d.now += 29.0
    assert isinstance(ask(d, "5"), RejectRequest)
    d.now += 1.1
    assert isinstance(ask(d, "6"), DispatchRequest)


def test_tokens_are_those_of_prompt_and_limit() -> None:
    d = driver(requests_per_minute=0, tokens_per_minute=1000)
    assert isinstance(ask(d, "1", num_prompt_tokens=300, max_output_tokens=500), DispatchRequest)
    rejected = ask(d, "2", num_prompt_tokens=300, max_output_tokens=None)
    assert isinstance(rejected, RejectRequest)
    assert rejected.retry_after_s == pytest.approx(6.0)
    assert "1,000 tokens a minute" in rejected.reason


def test_one_that_is_longer_than_a_minute_waits_for_a_full_bucket() -> None:
    d = driver(requests_per_minute=0, tokens_per_minute=100)
    assert isinstance(ask(d, "1", num_prompt_tokens=400), DispatchRequest)
    d.now += 239.0
    assert isinstance(ask(d, "2", num_prompt_tokens=400), RejectRequest)
    d.now += 1.5
    assert isinstance(ask(d, "3", num_prompt_tokens=400), DispatchRequest)


@given(
    gaps_s=st.lists(st.floats(0, 40), min_size=1, max_size=60),
    limit=st.integers(1, 10),
)
def test_no_minute_has_more_than_twice_the_quota_and_no_second_judgement_counts(
    gaps_s: list[float], limit: int
) -> None:
    quota = Quota(requests_per_minute=limit)
    snapshot = make_driver("round_robin", ONE).scheduler.snapshot(0.0)
    now_s, admitted_s = 0.0, []
    for number, gap_s in enumerate(gaps_s):
        now_s += gap_s
        request = SchedulingRequest(request_id=str(number), num_prompt_tokens=1, client_id="c")
        verdict = quota.admit(request, _at(snapshot, now_s))
        if verdict == ADMIT:
            admitted_s.append(now_s)
            assert quota.admit(request, _at(snapshot, now_s)) == ADMIT
        else:
            assert isinstance(verdict, Reject)
            assert verdict.retry_after_s is not None
            assert 0 < verdict.retry_after_s <= 60.0 / limit + 1e-6
        recent = [at_s for at_s in admitted_s if at_s > now_s - 60.0]
        assert len(recent) <= 2 * limit


def test_the_answer_tells_what_is_left() -> None:
    d = driver(requests_per_minute=3, tokens_per_minute=600)
    told = [
        ask(d, str(number), num_prompt_tokens=100, max_output_tokens=20).allowance
        for number in range(4)
    ]
    assert [(a.requests.limit, a.requests.remaining) for a in told] == [
        *((3, 2), (3, 1), (3, 0)),
        (3, 0),
    ]
    assert [(a.tokens.limit, a.tokens.remaining) for a in told] == [
        *((600, 480), (600, 360), (600, 240)),
        (600, 240),
    ]
    assert [a.requests.reset_s for a in told] == pytest.approx([20, 40, 60, 60])
    assert told[-1].tokens.reset_s == pytest.approx(36)


def test_what_is_unlimited_is_not_told() -> None:
    allowance = ask(
        driver(requests_per_minute=0, tokens_per_minute=50), "1", num_prompt_tokens=80
    ).allowance
    assert allowance.requests is None
    assert allowance.tokens.remaining == 0
    assert allowance.tokens.reset_s > 60, "a prompt longer than a minute's tokens leaves a debt"
    (plain,) = make_driver(build_bundle(loads("policy: round_robin")), ONE).arrive("r")
    assert isinstance(plain, DispatchRequest)
    assert plain.allowance is None


def test_what_is_told_is_no_part_of_a_decision() -> None:
    """A log of a release that did not tell it replays alike."""
    told = ask(driver(requests_per_minute=3), "1")
    assert told.allowance is not None
    assert told == msgspec.structs.replace(told, allowance=None)
    decoded = decode_action(encode(told))
    assert isinstance(decoded, DispatchRequest)
    assert decoded.allowance is not None
    assert decoded.allowance.requests is not None
    assert decoded.allowance.requests.remaining == 2


def test_memory_goes_into_checkpoints() -> None:
    quota, snapshot = Quota(requests_per_minute=1), make_driver("round_robin", ONE).scheduler
    request = SchedulingRequest(request_id="r", num_prompt_tokens=1, client_id="c")
    assert quota.admit(request, snapshot.snapshot(0.0)) == ADMIT
    other = Quota(requests_per_minute=1)
    other.restore(quota.state())
    assert other.admit(request, snapshot.snapshot(0.0)) == ADMIT
    second = SchedulingRequest(request_id="s", num_prompt_tokens=1, client_id="c")
    assert isinstance(other.admit(second, snapshot.snapshot(0.0)), Reject)


def test_clients_are_bounded() -> None:
    quota = Quota(requests_per_minute=1, max_clients=2)
    snapshot = make_driver("round_robin", ONE).scheduler.snapshot(0.0)
    for number in range(5):
        request = SchedulingRequest(
            request_id=str(number), num_prompt_tokens=1, client_id=str(number)
        )
        assert quota.admit(request, snapshot) == ADMIT
    assert len(quota.state()["clients"]) == 2
    assert not math.isnan(quota.state()["clients"][0][1])


class _At:
    """A snapshot at another time."""

    def __init__(self, snapshot: Any, now_s: float) -> None:
        self._snapshot, self.now = snapshot, now_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._snapshot, name)


def _at(snapshot: Any, now_s: float) -> Any:
    return _At(snapshot, now_s)
