"""KV of idle sessions goes where their next turns go, while that is worth it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llumsched.core.actions import (
    Action,
    DispatchRequest,
    RefuseMigration,
    StartMigration,
    TerminateInstance,
)
from llumsched.core.events import (
    DrainRequested,
    InstanceLost,
    KvBlocksStored,
    MigrationFinished,
    MigrationOutcome,
    MigrationRequested,
    RequestAborted,
    RequestFinished,
    Ticked,
)
from llumsched.core.scheduling.scheduler import GlobalScheduler
from tests.core.builders import Driver
from tests.policies.clusters import make_driver, place, report

ROOM = {"num_total_blocks": 1000, "num_free_blocks": 1000}
LONG = 100
"""Blocks of a prompt that takes longer to compute than to copy, with the default costs."""


def driver(num_instances: int = 2, policy: str = "round_robin", **options: Any) -> Driver:
    names = "abcdefgh"[:num_instances]
    options = {"stale_after_s": 1e6, "session_imbalance": 0, **options}
    return make_driver(policy, dict.fromkeys(names, ROOM), **options)


def turn(d: Driver, request_id: str, session_id: str = "s", **fields: Any) -> str:
    """Where a turn runs, which has ended when this returns."""
    where = place(d, request_id, session_id=session_id, num_blocks=LONG, **fields)
    assert where is not None
    d.handle(RequestFinished(request_id=request_id, num_output_tokens=10))
    report(d, where, ROOM)
    return where


def make_hot(d: Driver, instance_id: str) -> None:
    """Let an instance run more than others, so that turns of its sessions leave it."""
    load = {"num_total_blocks": 1000, "num_free_blocks": 500, "num_running": 20}
    report(d, instance_id, load)


def hot_turn(d: Driver, request_id: str, home: str, **fields: Any) -> tuple[Action, ...]:
    """A turn arrives whose home is hot, at a policy whose turn it is to choose another."""
    make_hot(d, home)
    fields = {"session_id": "s", "num_blocks": LONG, **fields}
    return d.arrive(request_id, **fields)


def start_of(actions: tuple[Action, ...]) -> StartMigration:
    (start,) = (a for a in actions if isinstance(a, StartMigration))
    return start


def end(
    d: Driver, start: StartMigration, outcome: MigrationOutcome = MigrationOutcome.COMMITTED
) -> tuple[Action, ...]:
    return d.handle(
        MigrationFinished(
            migration_id=start.migration_id,
            request_id=start.request_id,
            source=start.source,
            destination=start.destination,
            outcome=outcome,
            num_bytes=10**6,
            total_s=0.1,
        )
    )


def begun(**options: Any) -> tuple[Driver, str, StartMigration]:
    """A session's second turn is held, and its KV moves."""
    d = driver(policy="least_requests", **options)
    home = turn(d, "1")
    (other,) = {"a", "b"} - {home}
    actions = hot_turn(d, "2", home)
    start = start_of(actions)
    assert len(actions) == 1, "it is held"
    return d, other, start


def test_a_turn_goes_after_the_kv_of_its_session() -> None:
    d, other, start = begun()
    assert (start.destination, start.request_id) == (other, "1")
    assert start.has_ended
    assert (start.expected_cost_s or 1e9) < (start.expected_win_s or 0.0)
    (sent,) = end(d, start)
    assert isinstance(sent, DispatchRequest)
    assert sent.instance_id == other


@pytest.mark.parametrize("outcome", [MigrationOutcome.REFUSED, MigrationOutcome.ABORTED])
def test_without_it_the_turn_goes_all_the_same(outcome: MigrationOutcome) -> None:
    d, other, start = begun()
    (sent,) = end(d, start, outcome)
    assert isinstance(sent, DispatchRequest)
    assert sent.instance_id == other
    d.handle(RequestFinished(request_id="2"))
    assert d.scheduler.next_deadline() is None


def test_a_source_that_refused_is_left_alone_for_a_while() -> None:
    d, _, start = begun()
    end(d, start, MigrationOutcome.REFUSED)
    d.handle(RequestFinished(request_id="2"))
    report(d, start.source, ROOM)
    for number in range(3, 6):
        if turn(d, str(number), session_id="o") == start.source:
            break
    else:
        pytest.fail("no session is at home there")
    (sent,) = hot_turn(d, "6", start.source, session_id="o")
    assert isinstance(sent, DispatchRequest)


def test_a_turn_waits_no_longer_than_it_would_be_computed_in() -> None:
    d, other, start = begun()
    deadline = d.scheduler.next_deadline()
    assert deadline is not None
    assert deadline == pytest.approx(d.now + (start.expected_win_s or 0.0))
    report(d, other, ROOM)
    assert d.scheduler.request_instance("2") is None
    d.now = deadline
    (sent,) = d.handle(Ticked())
    assert isinstance(sent, DispatchRequest)
    assert sent.instance_id == other
    assert (d.scheduler.next_deadline() or 1e9) > d.now, "nothing is left to wake up for"
    end(d, start)


def test_a_turn_that_its_client_gives_up_leaves_nothing() -> None:
    d, _, start = begun()
    d.handle(RequestAborted(request_id="2"))
    deadline = d.scheduler.next_deadline()
    assert deadline is not None
    d.now = deadline
    assert d.handle(Ticked()) == ()
    end(d, start)
    assert d.scheduler.next_deadline() is None


def test_others_pass_a_turn_that_waits() -> None:
    d, _, _ = begun()
    assert place(d, "o", session_id="o") is not None
    assert d.scheduler.request_instance("2") is None


@pytest.mark.parametrize(
    "changes", [{"move_idle_sessions": False}, {"session_ttl_s": 0.0}, {"num_blocks": 1}]
)
def test_what_is_not_wanted_or_not_worth_it_does_not_move(changes: dict[str, Any]) -> None:
    num_blocks = changes.pop("num_blocks", LONG)
    d = driver(policy="least_requests", **changes)
    home = turn(d, "1")
    (sent,) = hot_turn(d, "2", home, num_blocks=num_blocks)
    assert isinstance(sent, DispatchRequest)
    assert sent.instance_id != home


def test_the_rate_of_copies_is_learned() -> None:
    """Of a megabyte a second, that of the moves so far, no session is worth its bytes."""
    d = driver(policy="least_requests")
    moves = d.scheduler._session_moves
    before = moves._bytes_per_s
    home = turn(d, "1")
    start = start_of(hot_turn(d, "2", home))
    end(d, start)
    assert moves._bytes_per_s < before


def test_a_prefix_that_the_other_has_too_is_not_waited_for() -> None:
    d = driver(policy="prefix_aware", session_imbalance=100)
    names = tuple(range(LONG))
    home = turn(d, "1", prefix_hashes=names)
    (other,) = {"a", "b"} - {home}
    d.handle(KvBlocksStored(instance_id=home, block_hashes=names))
    d.handle(KvBlocksStored(instance_id=other, block_hashes=names[:-2]))
    d.handle(DrainRequested(instance_id=home))
    place(d, "2", session_id="s", num_blocks=LONG, prefix_hashes=names)
    assert d.scheduler.request_instance("2") == other


def drained(d: Driver, instance_id: str, **fields: Any) -> tuple[Action, ...]:
    return d.handle(DrainRequested(instance_id=instance_id, **fields))


def test_idle_sessions_leave_an_instance_that_drains() -> None:
    d = driver()
    home = turn(d, "1")
    (other,) = {"a", "b"} - {home}
    actions = drained(d, home)
    start = start_of(actions)
    assert (start.source, start.destination, start.has_ended) == (home, other, True)
    assert not any(isinstance(a, TerminateInstance) for a in actions)
    assert any(isinstance(a, TerminateInstance) for a in end(d, start))
    assert place(d, "2", session_id="s") == other


def test_those_seen_last_leave_first_and_few_at_a_time() -> None:
    d = driver(3, max_session_moves=2, max_migrations_out=4)
    home = "a"
    seen = []
    for number in range(12):
        d.now += 1
        if turn(d, str(number), session_id=f"s{number}") == home:
            seen.append(str(number))
    starts = [a for a in drained(d, home) if isinstance(a, StartMigration)]
    moved = [start.request_id for start in starts]
    assert len(moved) == 2
    while starts:
        more = [a for a in end(d, starts.pop(0)) if isinstance(a, StartMigration)]
        starts += more
        moved += [start.request_id for start in more]
    assert moved == seen[::-1]
    assert home not in {d.scheduler.request_instance(str(n)) for n in range(12)}
    assert not d.scheduler.draining


def test_a_drain_does_not_wait_for_ever() -> None:
    d = driver(session_drain_s=7.0, max_migrations_out=1)
    home = turn(d, "1")
    for number in range(2, 8):
        turn(d, str(number), session_id=f"s{number}")
    start = start_of(drained(d, home))
    assert d.scheduler.next_deadline() == d.now + 7.0
    d.now += 7.0
    assert d.handle(Ticked()) == (), "what moves still does"
    assert any(isinstance(a, TerminateInstance) for a in end(d, start))


def test_a_drain_goes_on_without_sessions_that_its_instance_keeps_refusing() -> None:
    d = driver(session_drain_s=1e4, max_session_moves=1)
    home = turn(d, "1")
    for number in range(2, 16):
        turn(d, str(number), session_id=f"s{number}")
    actions = drained(d, home)
    for _ in range(10):
        if any(isinstance(a, TerminateInstance) for a in actions):
            break
        for start in (a for a in actions if isinstance(a, StartMigration)):
            actions = end(d, start, MigrationOutcome.REFUSED)
        if not actions:
            d.now += 100.0
            actions = d.handle(Ticked())
    else:
        pytest.fail("it never leaves")


def test_a_drain_that_nobody_takes_part_in_is_over_at_once() -> None:
    d = driver(1)
    home = turn(d, "1")
    (left,) = drained(d, home)
    assert isinstance(left, TerminateInstance)


def test_sessions_past_their_time_stay() -> None:
    d = driver(session_ttl_s=10.0)
    home = turn(d, "1")
    d.now += 11.0
    report(d, "a", ROOM)
    report(d, "b", ROOM)
    (left,) = drained(d, home)
    assert isinstance(left, TerminateInstance)


def test_a_destination_that_dies_ends_the_move_and_the_wait() -> None:
    d, other, start = begun()
    (sent,) = d.handle(InstanceLost(instance_id=other))
    assert isinstance(sent, DispatchRequest)
    assert sent.instance_id == start.source


def asked(d: Driver, session_id: str, to: str | None = None) -> Action:
    event = MigrationRequested(request_id="", destination=to, session_id=session_id)
    (action,) = d.handle(event)
    return action


def test_an_operator_moves_a_session() -> None:
    d = driver(3)
    home = turn(d, "1")
    (third,) = {"b", "c"} - {home} - {"b"} or {"a"}
    start = asked(d, "s", third)
    assert isinstance(start, StartMigration)
    assert (start.request_id, start.destination, start.has_ended) == ("1", third, True)
    again = asked(d, "s", third)
    assert isinstance(again, RefuseMigration)
    assert "already moving" in again.reason
    end(d, start)
    report(d, third, ROOM)
    back = asked(d, "s", third)
    assert isinstance(back, RefuseMigration)
    assert "equals source" in back.reason


def test_an_operator_moves_the_turn_that_runs() -> None:
    d = driver()
    home = place(d, "1", session_id="s", num_blocks=LONG)
    start = asked(d, "s")
    assert isinstance(start, StartMigration)
    assert (start.request_id, start.source, start.has_ended) == ("1", home, False)


def test_an_operator_is_told_of_an_unknown_session() -> None:
    refused = asked(driver(), "nobody's")
    assert isinstance(refused, RefuseMigration)
    assert "no session" in refused.reason


def test_moves_go_into_checkpoints() -> None:
    d, other, start = begun()
    state = json.loads(json.dumps(d.scheduler.checkpoint(), allow_nan=False))
    d.scheduler = GlobalScheduler(d.scheduler.bundle, d.scheduler.options)
    d.scheduler.restore(state)
    assert d.scheduler.request_instance("2") is None
    (sent,) = end(d, start)
    assert isinstance(sent, DispatchRequest)
    assert sent.instance_id == other
