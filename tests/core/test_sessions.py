"""Turns of a session go where the last one was, while that costs nobody much."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llumsched.core.actions import DispatchRequest
from llumsched.core.events import (
    InstanceLost,
    MigrationFinished,
    MigrationOutcome,
    MigrationRequested,
    RequestFinished,
)
from llumsched.core.scheduling.scheduler import GlobalScheduler
from llumsched.core.types import InstanceRole
from tests.core.builders import Driver
from tests.policies.clusters import make_driver, place, report

TWO = {name: {"num_total_blocks": 1000, "num_free_blocks": 1000} for name in "ab"}


def driver(policy: str = "round_robin", **options: Any) -> Driver:
    return make_driver(policy, TWO, stale_after_s=1e6, **options)


def turn(d: Driver, request_id: str, session_id: str | None = "s", **fields: Any) -> str | None:
    """Where a turn runs, which has ended when this returns."""
    where = place(d, request_id, session_id=session_id, **fields)
    d.handle(RequestFinished(request_id=request_id))
    return where


def test_turns_of_a_session_stay_and_others_go_round() -> None:
    d = driver()
    first = turn(d, "1")
    others = {turn(d, f"o{number}", session_id=None) for number in range(3)}
    assert others == {"a", "b"}
    assert [turn(d, str(number)) for number in range(2, 6)] == [first] * 4
    (sent,) = d.arrive("6", session_id="s")
    assert isinstance(sent, DispatchRequest)
    assert sent.reason in ("the last turn of its session was here", "round-robin")


def test_sessions_of_two_clients_are_two() -> None:
    d = driver()
    homes = {client: turn(d, client, client_id=client) for client in ("c", "d")}
    assert set(homes.values()) == {"a", "b"}
    for number in range(4):
        client = "cd"[number % 2]
        assert turn(d, f"{client}{number}", client_id=client) == homes[client]


def test_a_session_is_forgotten_after_its_time_which_each_turn_begins_anew() -> None:
    d = driver(session_ttl_s=10)
    home = turn(d, "1")
    for number in range(5):
        d.now += 9
        assert turn(d, f"t{number}") == home
    d.now += 11
    assert {turn(d, "a1"), turn(d, "o", session_id=None)} == {"a", "b"}
    off = driver(session_ttl_s=0)
    assert {turn(off, "1"), turn(off, "2")} == {"a", "b"}


def test_time_counts_from_the_end_of_a_turn() -> None:
    d = driver(session_ttl_s=10)
    home = place(d, "1", session_id="s")
    d.now += 100
    d.handle(RequestFinished(request_id="1"))
    d.now += 9
    assert [turn(d, "2"), turn(d, "3")] == [home] * 2


def test_a_crowded_instance_keeps_no_session() -> None:
    d = driver("least_requests", session_imbalance=2)
    home = turn(d, "1")
    assert home is not None
    report(d, home, {**TWO[home], "num_running": 2})
    assert turn(d, "2") == home
    report(d, home, {**TWO[home], "num_running": 3})
    assert turn(d, "3") not in (home, None)


def test_an_instance_without_room_keeps_none_where_another_has_some() -> None:
    d = driver()
    home = turn(d, "1")
    assert home is not None
    report(d, home, {"num_total_blocks": 1000, "num_free_blocks": 2})
    assert {turn(d, f"t{number}", num_blocks=3) for number in range(2)} == {"a", "b"} - {home}


def test_a_lost_instance_is_no_home() -> None:
    d = driver()
    home = turn(d, "1")
    assert home is not None
    d.handle(InstanceLost(instance_id=home))
    assert [turn(d, "2"), turn(d, "3")] == list({"a", "b"} - {home}) * 2


def test_the_home_moves_with_the_request() -> None:
    d = driver()
    home = place(d, "1", session_id="s")
    assert home is not None
    (other,) = {"a", "b"} - {home}
    (order,) = d.handle(MigrationRequested(request_id="1", destination=other))
    d.handle(
        MigrationFinished(
            migration_id=order.migration_id,  # type: ignore[union-attr]
            request_id="1",
            source=home,
            destination=other,
            outcome=MigrationOutcome.COMMITTED,
        )
    )
    assert d.scheduler.request_instance("1") == other
    d.handle(RequestFinished(request_id="1"))
    assert [turn(d, "2"), turn(d, "3")] == [other] * 2


def test_where_prefixes_are_known_they_decide() -> None:
    d = driver("prefix_aware")
    home = turn(d, "1")
    assert home is not None
    (other,) = {"a", "b"} - {home}
    report(d, home, {**TWO[home], "num_running": 1, "num_free_blocks": 500})
    assert turn(d, "2", prefix_hashes=(1, 2)) == other
    assert turn(d, "3") == other, "nothing is named: its session decides"
    assert turn(d, "4") == other


def test_roles_are_kept_apart() -> None:
    loads = {
        "a": {**TWO["a"], "role": InstanceRole.PREFILL},
        "b": {**TWO["b"], "role": InstanceRole.DECODE},
    }
    d = make_driver("round_robin", loads, stale_after_s=1e6)
    assert {turn(d, "1"), turn(d, "2")} == {"a", "b"}


@pytest.mark.parametrize("is_restored", [False, True])
def test_sessions_go_into_checkpoints(is_restored: bool) -> None:
    d = driver()
    home = turn(d, "1")
    state = json.loads(json.dumps(d.scheduler.checkpoint()))
    if is_restored:
        d.scheduler = GlobalScheduler(d.scheduler.bundle, d.scheduler.options)
        d.scheduler.restore(state)
    assert [turn(d, "2"), turn(d, "3")] == [home] * 2
