"""A request that cannot be moved is refused with a reason, and nothing is lost by that."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from tests.e2e.cases import COMPLETIONS, completion
from tests.e2e.client import (
    POLL_INTERVAL_S,
    REQUEST_TIMEOUT_S,
    Admin,
    Answer,
    Chunk,
    belongs,
    collect,
    differences,
)
from tests.e2e.moving import move

# Of the 64 blocks of an instance: 25 each when they start, 29 at their end.
FILLERS = [[2000 + (i * step) % 9000 for i in range(800)] for step in (7, 11)]
# Needs 12 blocks and two to grow: more than the fillers leave.
VICTIM = completion(prompt=[3000 + i % 989 for i in range(370)], max_tokens=80)


def reason(answer: Answer, status: int) -> str:
    """The sentence of a refusal, in OpenAI's shape."""
    assert answer.status == status, answer
    error = answer.body["error"]
    assert error["code"] == status
    assert error["type"] == {404: "NotFoundError", 409: "ConflictError"}[status]
    text: str = error["message"]
    return text


@contextmanager
def running(pool: Admin, **fields: object) -> Iterator[tuple[str, Iterator[Chunk]]]:
    """A long request that decodes, as its id and the rest of its chunks."""
    with pool.stream(COMPLETIONS, completion(max_tokens=400) | fields) as stream:
        yield next(stream)["id"], stream


def test_request_that_does_not_exist(pool: Admin) -> None:
    assert "No unfinished request 'cmpl-none'" in reason(pool.migrate("cmpl-none"), 404)


def test_request_that_has_finished(pool: Admin) -> None:
    ids: set[str] = set()
    pool.whole(COMPLETIONS, completion(max_tokens=4), lambda _, chunk: ids.add(chunk["id"]))
    (request_id,) = ids
    assert request_id in reason(pool.migrate(request_id), 404)


def test_destination_that_does_not_exist(pool: Admin) -> None:
    with running(pool) as (request_id, stream):
        sentence = reason(pool.migrate(request_id, "instance-7"), 404)
        assert all(name in sentence for name in ("instance-7", "instance-0", "instance-1"))
        assert next(stream)["choices"]


def test_destination_that_has_it_already(pool: Admin) -> None:
    with running(pool) as (request_id, stream):
        here = pool.request(request_id)["instance_id"]
        assert "destination equals source" in reason(pool.migrate(request_id, here), 409)
        assert next(stream)["choices"]


@pytest.mark.parametrize("body", [b"{}", b'{"request_id": "a", "to": "b"}', b"{"])
def test_body_that_is_none(pool: Admin, body: bytes) -> None:
    answer = pool.post_bytes("/llumsched/migrations", body)
    assert answer.status == 400, answer
    assert answer.body["error"]["message"]


def test_prompt_still_being_computed_moves(pool: Admin) -> None:
    """The prompt begins anew there, or goes after its first token: by how much is done."""
    prompt = [5000 + (i * 13) % 8000 for i in range(700)]
    # More tokens than are put out while the prompt's blocks are copied.
    body = completion(prompt=prompt, max_tokens=300)
    # Alone on its instance a prompt is computed in one step; beside another request in many.
    with (
        running(pool) as (one, _),
        running(pool) as (two, _),
        pool.stream(COMPLETIONS, body) as stream,
    ):
        (request,) = (r for r in pool.requests() if not belongs(r, one) and not belongs(r, two))
        deadline_s = time.monotonic() + REQUEST_TIMEOUT_S
        # Where it is quick, it may be done before anyone is told that it has begun.
        while not (
            any(load["num_prefill_tokens_pending"] for load in pool.instances().values())
            or any(
                other["num_output_tokens"]
                for other in pool.requests()
                if other["request_id"] == request["request_id"]
            )
        ):
            assert time.monotonic() < deadline_s
            time.sleep(POLL_INTERVAL_S / 5)
        answer = pool.migrate(request["request_id"])
        assert answer.status == 200, answer
        found = collect(list(stream))
    expected = pool.whole(COMPLETIONS, body)
    assert not differences(found.choices, expected.choices)


@dataclass(frozen=True, slots=True)
class Full:
    """An instance without room, and the other one."""

    instance_id: str
    other: str


@contextmanager
def full_instance(pool: Admin) -> Iterator[Full]:
    """While this lasts, two long requests fill an instance."""
    with ExitStack() as stack:
        bodies = [completion(prompt=filler, max_tokens=220) for filler in FILLERS]
        streams = [stack.enter_context(pool.stream(COMPLETIONS, body)) for body in bodies]
        ids = [next(stream)["id"] for stream in streams]
        full = pool.request(ids[1])["instance_id"]
        if pool.request(ids[0])["instance_id"] != full:
            answer = move(pool, ids[0], full)
            assert answer.status == 200, answer
        (other,) = pool.instances().keys() - {full}
        yield Full(full, other)
        assert len(pool.requests()) >= 2, "the fillers were to last longer than the test"


def test_full_destination_refuses_and_the_stream_goes_on(pool: Admin) -> None:
    expected = pool.whole(COMPLETIONS, VICTIM)
    with full_instance(pool) as full, pool.stream(COMPLETIONS, VICTIM) as stream:
        chunks = [next(stream)]
        request_id = chunks[0]["id"]
        assert pool.request(request_id)["instance_id"] == full.other
        sentence = reason(pool.migrate(request_id, full.instance_id), 409)
        assert "free blocks" in sentence
        # Again, for a refusal must not stick.
        assert "free blocks" in reason(pool.migrate(request_id, full.instance_id), 409)
        chunks += stream
    assert not differences(collect(chunks).choices, expected.choices)


def test_request_that_waits_for_room_is_sent_on(pool: Admin) -> None:
    expected = pool.whole(COMPLETIONS, VICTIM)
    with ExitStack() as stack, full_instance(pool) as full:
        # Requests take turns, so one of two goes to the full instance.
        streams = [stack.enter_context(pool.stream(COMPLETIONS, VICTIM)) for _ in range(2)]
        deadline_s = time.monotonic() + REQUEST_TIMEOUT_S
        while not (
            waiting := [
                request["request_id"]
                for request in pool.requests()
                if request["instance_id"] == full.instance_id and request["num_output_tokens"] == 0
            ]
        ):
            assert time.monotonic() < deadline_s
            time.sleep(POLL_INTERVAL_S)
        answer = pool.migrate(waiting[0])
        assert answer.status == 200, answer
        assert answer.body["destination"] == full.other
        for stream in streams:
            assert not differences(collect(list(stream)).choices, expected.choices)


def test_pool_describes_itself(pool: Admin) -> None:
    with running(pool) as (request_id, _):
        request = pool.request(request_id)
        assert belongs(request, request_id)
        assert request["num_moves"] == 0
        assert move(pool, request_id).status == 200
        after = pool.request(request_id)
        assert after["num_moves"] == 1
        assert after["instance_id"] != request["instance_id"]
        assert after["num_output_tokens"] > request["num_output_tokens"]
    answer = pool.get("/llumsched/instances")
    assert answer.body["policy"] == "round_robin"
    assert [i["state"] for i in answer.body["instances"]] == ["serving", "serving"]
    assert answer.body["migrations"]["committed"] >= 1
