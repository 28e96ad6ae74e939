"""A pool of two frontends: KV events, schemas without an answer, adapters, a full pool, a pause."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import zmq

from tests.e2e.cases import CHAT, COMPLETIONS, QUESTION, completion
from tests.e2e.client import (
    IDLE_TIMEOUT_S,
    POLL_INTERVAL_S,
    Admin,
    Chunk,
    Whole,
    differences,
    in_parallel,
)
from tests.e2e.moving import Mover
from tests.e2e.servers import ADAPTER, MAX_NUM_SEQS, Server


@pytest.fixture
def pool(unusual_server: Server, model: str) -> Iterator[Admin]:
    with Admin.at_rest(unusual_server.url, model) as pool:
        yield pool


def test_each_instance_publishes_its_kv_events(pool: Admin, events_port: int) -> None:
    with zmq.Context() as context:
        sockets = []
        for index in (0, 1):
            socket = context.socket(zmq.SUB)
            socket.connect(f"tcp://127.0.0.1:{events_port + index}")
            socket.subscribe(b"")
            sockets.append(socket)
        try:
            heard: set[int] = set()
            while len(heard) < len(sockets):
                prompt = [1000 + random.randrange(999) for _ in range(100)]
                body = completion(prompt=prompt, max_tokens=4)

                def ask(body: dict[str, Any] = body) -> None:
                    pool.whole(COMPLETIONS, body)

                in_parallel(ask, ask)
                heard |= {i for i, socket in enumerate(sockets) if socket.poll(timeout=1000)}
        finally:
            for socket in sockets:
                socket.close(linger=0)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_schema_that_is_only_itself_is_a_400_and_engines_go_on(
    pool: Admin, is_stream: bool
) -> None:
    before = [berth["pid"] for berth in pool.get("/llumsched/instances").body["berths"]]
    schemas: tuple[dict[str, Any], ...] = (
        {"$ref": "#"},
        {"$ref": "#/nowhere"},
        {"type": "foo"},
        {"enum": []},
    )
    for schema in schemas:
        body = {
            "model": pool.model,
            "messages": QUESTION,
            "max_tokens": 8,
            "stream": is_stream,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "it", "schema": schema},
            },
        }
        answer = pool.post(CHAT, body)
        assert answer.status == 400, answer
        assert answer.body["error"]["message"]
    assert pool.whole(COMPLETIONS, completion(max_tokens=4)).text
    assert [b["pid"] for b in pool.get("/llumsched/instances").body["berths"]] == before


def test_moves_of_requests_with_an_adapter_under_load(pool: Admin) -> None:
    """All move there and back past each other.

    None goes without the adapter: in a batch with others vLLM 0.32 on a CPU applies it to all.
    """
    bodies = [completion(model=ADAPTER, temperature=0.9, seed=seed) for seed in range(6)]
    alone = [pool.whole(COMPLETIONS, body) for body in bodies]
    movers = [Mover(pool, (2, 12)) for _ in bodies]
    found: dict[int, Whole] = {}

    def ask(index: int) -> None:
        found[index] = pool.whole(COMPLETIONS, bodies[index], on_chunk=movers[index])

    in_parallel(*(lambda i=i: ask(i) for i in range(len(bodies))))
    for index, expected in enumerate(alone):
        assert not differences(found[index].as_dict(), expected.as_dict()), bodies[index]
    assert any(a.status == 200 for mover in movers for a in mover.answers)


def test_a_full_pool_is_listed_stands_still_when_paused_and_serves_by_priority(pool: Admin) -> None:
    """Each place that becomes free is for the most urgent of those that wait."""
    begun: list[str] = []

    def ask(name: str, priority: int) -> None:
        def begins(number: int, _: Chunk) -> None:
            if number == 1:
                begun.append(name)

        pool.whole(COMPLETIONS, completion(priority=priority, max_tokens=4), on_chunk=begins)

    with ExitStack() as places:
        running = [_take_place(pool, places) for _ in range(2 * MAX_NUM_SEQS)]
        # The least urgent come first.
        waiting = [("low", 5)] * 2 + [("normal", 0)] * 2 + [("high", -1)] * 2

        def pause_then_free_a_place_on_each() -> None:
            _await(lambda: len(pool.requests()) == len(running) + len(waiting))
            listed = {r["external_id"].rsplit("-", 1)[0]: r for r in pool.requests()}
            assert {request_id for request_id, _ in running} <= set(listed)
            _stands_still_while_paused(pool, running[0][0])
            assert not begun
            for instance in ("instance-0", "instance-1"):
                leave = next(
                    leave for id_, leave in running if listed[id_]["instance_id"] == instance
                )
                leave()

        in_parallel(
            *(
                lambda name=name, priority=priority: ask(name, priority)
                for name, priority in waiting
            ),
            pause_then_free_a_place_on_each,
        )
    assert sorted(begun) == ["high", "high", "low", "low", "normal", "normal"]
    # Two places: whoever is second of a class may begin beside the first of the next.
    assert begun[0] == "high"
    assert begun.index("normal") < begun.index("low")
    assert begun[-1] == "low"


def _take_place(pool: Admin, places: ExitStack) -> tuple[str, Callable[[], None]]:
    """Ask for a long answer; its id once its first token has come, and how to leave."""
    place = places.enter_context(ExitStack())
    first = next(place.enter_context(pool.stream(COMPLETIONS, completion(max_tokens=900))))
    return first["id"], place.close


def _stands_still_while_paused(pool: Admin, request_id: str) -> None:
    assert pool.post("/pause?mode=keep", {}).status == 200
    try:
        _reports_pass(pool)
        before = [(r["request_id"], r["num_output_tokens"]) for r in pool.requests()]
        refused = pool.migrate(request_id)
        assert refused.status == 409, refused
        assert "paused" in refused.body["error"]["message"]
        _reports_pass(pool)
        assert [(r["request_id"], r["num_output_tokens"]) for r in pool.requests()] == before
    finally:
        assert pool.post("/resume", {}).status == 200


def _await(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + IDLE_TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(POLL_INTERVAL_S)


def _reports_pass(pool: Admin) -> None:
    """Wait until each instance has reported twice: what was under way before has come."""
    before = {name: load["sequence"] for name, load in pool.instances().items()}
    _await(lambda: all(load["sequence"] >= before[i] + 2 for i, load in pool.instances().items()))
