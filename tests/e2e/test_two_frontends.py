"""A pool of two frontends under load: adapters, priorities, pauses, KV events, odd schemas."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zmq

from scripts.server_process import free_port
from tests.e2e.cases import CHAT, COMPLETIONS, NUM_TOKENS, QUESTION, completion
from tests.e2e.client import (
    IDLE_TIMEOUT_S,
    POLL_INTERVAL_S,
    Admin,
    Whole,
    differences,
    in_parallel,
)
from tests.e2e.moving import Mover
from tests.e2e.servers import Server, llumsched
from tests.migration.adapters import RANK, make_adapter

MAX_NUM_SEQS = 4
ADAPTER = "of-the-tests"


@pytest.fixture(scope="module")
def events_port() -> int:
    """The first of two ports of loopback that nothing listens on."""
    return free_port()


@pytest.fixture(scope="module")
def server(model: str, log_folder: Path, events_port: int) -> Iterator[Server]:
    adapter = log_folder / "adapter"
    adapter.mkdir()
    make_adapter(model, adapter)
    events = {"enable_kv_cache_events": True, "endpoint": f"tcp://*:{events_port}"}
    server = llumsched(
        model,
        log_folder,
        *("--instances=2", "--frontends=2", "--policy=round_robin"),
        *("--scheduling-policy=priority", f"--max-num-seqs={MAX_NUM_SEQS}"),
        *("--enable-lora", f"--max-lora-rank={RANK}", f"--lora-modules={ADAPTER}={adapter}"),
        f"--kv-events-config={json.dumps(events)}",
        "--shutdown-timeout=25",
        name="llumsched-unusual",
        VLLM_SERVER_DEV_MODE="1",
    )
    try:
        server.await_health()
        yield server
    finally:
        server.end()


@pytest.fixture
def pool(server: Server, model: str) -> Iterator[Admin]:
    with Admin.at_rest(server.url, model) as pool:
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
    """Every other request names the adapter; all move there and back past each other."""
    bodies = [
        completion(model=model, temperature=0.9, seed=seed)
        for seed, model in enumerate([pool.model, ADAPTER] * 3)
    ]
    alone = [pool.whole(COMPLETIONS, body) for body in bodies]
    movers = [Mover(pool, (2, 12)) for _ in bodies]
    found: dict[int, Whole] = {}

    def ask(index: int) -> None:
        found[index] = pool.whole(COMPLETIONS, bodies[index], on_chunk=movers[index])

    in_parallel(*(lambda i=i: ask(i) for i in range(len(bodies))))
    for index, expected in enumerate(alone):
        assert not differences(found[index].as_dict(), expected.as_dict()), bodies[index]
    assert alone[0].text != alone[1].text
    # One that has ended before its turn is not found.
    for mover in movers:
        assert {answer.status for answer in mover.answers} <= {200, 404}, mover.answers
    assert sum(a.status == 200 for mover in movers for a in mover.answers) >= len(bodies)


def test_who_waits_is_served_by_priority(pool: Admin) -> None:
    """On a full pool each place that becomes free is for the most urgent of those that wait."""
    begun: list[str] = []

    def ask(name: str, priority: int) -> None:
        body = completion(priority=priority, max_tokens=4)
        pool.whole(
            COMPLETIONS,
            body,
            on_chunk=lambda number, _: begun.append(name) if number == 1 else None,
        )

    with ExitStack() as places:
        leave = [
            _running(pool, places, completion(max_tokens=900)) for _ in range(2 * MAX_NUM_SEQS)
        ]
        # The least urgent come first.
        waiting = [("low", 5)] * 2 + [("normal", 0)] * 2 + [("high", -1)] * 2
        asked: list[Callable[[], None]] = []
        for name, priority in waiting:
            asked.append(partial(ask, name, priority))
        all_wait = _all_known(pool, len(leave) + len(waiting))

        def one_place_on_each() -> None:
            _await(all_wait)
            assert not begun
            for instance in ("instance-0", "instance-1"):
                next(end for at, end in leave if at == instance)()

        in_parallel(*asked, one_place_on_each)
    assert [name for name, _ in itertools.groupby(sorted(begun))] == ["high", "low", "normal"]
    # Two places: whoever is second of a class may begin beside the first of the next.
    assert begun[0] == "high"
    assert begun.index("normal") < begun.index("low")
    assert begun[-1] == "low"


@pytest.mark.parametrize(
    ("pause", "resume"),
    [
        ("/pause?mode=keep", "/resume"),
        ("/sleep?level=0&mode=keep", "/wake_up?tags=scheduling"),
    ],
)
def test_a_pause_under_load_loses_nothing(pool: Admin, pause: str, resume: str) -> None:
    """Streams stand still and go on; who comes meanwhile waits, who leaves meanwhile is forgotten,
    and no request moves to where it could not run."""
    bodies = [
        completion(temperature=0.9, seed=seed, max_tokens=3 * NUM_TOKENS)
        for seed in range(2 * MAX_NUM_SEQS)
    ]
    expected = [pool.whole(COMPLETIONS, body) for body in bodies[:2]]
    found: dict[int, Whole] = {}
    counts = [0] * len(bodies)
    pids = [berth["pid"] for berth in pool.get("/llumsched/instances").body["berths"]]

    def ask(index: int) -> None:
        def count(number: int, _chunk: Any) -> None:
            counts[index] = number

        found[index] = pool.whole(COMPLETIONS, bodies[index], on_chunk=count)

    def pause_and_resume() -> None:
        _await(lambda: min(counts[:-1]) > 0)
        with ExitStack() as left:
            _, leave = _running(pool, left, completion(max_tokens=900))
            assert pool.post(pause, {}).status == 200
            try:
                _reports_pass(pool)
                stood, requests = list(counts), pool.requests()
                assert len(requests) == len(bodies)
                leave()
                refused = pool.migrate(requests[0]["request_id"])
                assert refused.status == 409, refused
                assert "paused" in refused.body["error"]["message"]
                late.start()
                _await(_all_known(pool, len(bodies)))
                _reports_pass(pool)
                assert counts == stood
            finally:
                assert pool.post(resume, {}).status == 200

    late = threading.Thread(target=ask, args=(len(bodies) - 1,))
    in_parallel(*(lambda i=i: ask(i) for i in range(len(bodies) - 1)), pause_and_resume)
    late.join(IDLE_TIMEOUT_S)
    assert not late.is_alive()
    assert len(found) == len(bodies)
    for index, whole in enumerate(expected):
        assert not differences(found[index].as_dict(), whole.as_dict())
    for whole in found.values():
        (choice,) = whole.choices.values()
        assert (choice["finish_reason"], len(choice["token_ids"])) == ("length", 3 * NUM_TOKENS)
    assert [b["pid"] for b in pool.get("/llumsched/instances").body["berths"]] == pids


def _running(pool: Admin, open_: ExitStack, body: dict[str, Any]) -> tuple[str, Callable[[], None]]:
    """Ask for a stream; the instance that runs it once its first token has come, and how to leave.

    A client that leaves closes its connection; what is not left by then is with ``open_``.
    """
    one = open_.enter_context(ExitStack())
    first = next(one.enter_context(pool.stream(COMPLETIONS, body)))
    return pool.request(first["id"])["instance_id"], one.close


def _all_known(pool: Admin, num_requests: int) -> Callable[[], bool]:
    return lambda: len(pool.requests()) == num_requests


def _await(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + IDLE_TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(POLL_INTERVAL_S)


def _reports_pass(pool: Admin) -> None:
    """Wait until each instance has reported twice: what was under way before has come."""
    before = {name: load["sequence"] for name, load in pool.instances().items()}
    _await(lambda: all(load["sequence"] >= before[i] + 2 for i, load in pool.instances().items()))
