"""Answers say where they come from, in headers and at the end of a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.testclient import TestClient

from llumsched.frontend.request.provenance import DONE, Provenance
from llumsched.frontend.request.rejection import (
    Rejected,
    RetryAfterMiddleware,
    placed,
    reasoned,
    tell_provenance,
    turned_away,
)


@dataclass
class Where:
    """A route; it moves when the test says so."""

    instance: int | None = 1
    num_moves: int = 0


def client(*, is_told: bool = True) -> TestClient:
    app = FastAPI()
    app.add_middleware(RetryAfterMiddleware)

    @app.post("/whole")
    async def whole() -> JSONResponse:
        reasoned("freeness=12.3\nand ünicode")
        route = Where()
        placed(route)
        route.instance, route.num_moves = 0, 2
        return JSONResponse({})

    @app.post("/stream")
    async def stream() -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            reasoned("round-robin")
            first, second = Where(instance=2), Where(instance=0)
            placed(first)
            placed(second)
            yield "data: 0\n\n"
            first.num_moves = second.num_moves = 1
            first.instance = 3
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.post("/rejected")
    async def rejected() -> JSONResponse:
        try:
            raise Rejected("full", 1.0)
        except Rejected as error:
            turned_away(error)
            return JSONResponse({"error": str(error)}, 503)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({})

    if is_told:
        tell_provenance(app, "latency")
    return TestClient(app)


def told(headers: object) -> dict[str, str]:
    return {k: v for k, v in dict(headers).items() if k.startswith("x-llumsched")}  # type: ignore[call-overload]


def test_an_answer_that_is_not_streamed_says_everything_in_its_head() -> None:
    assert told(client().post("/whole").headers) == {
        "x-llumsched-instance": "instance-0",
        "x-llumsched-policy": "latency",
        "x-llumsched-reason": "freeness=12.3?and ?nicode",
        "x-llumsched-migrations": "2",
    }


def test_a_stream_says_at_its_end_where_it_was_last_and_how_often_it_moved() -> None:
    answer = client().post("/stream")
    assert told(answer.headers)["x-llumsched-reason"] == "round-robin"
    assert "x-llumsched-migrations" not in answer.headers
    assert told(answer.headers)["x-llumsched-instance"] == "instance-0,instance-2"
    assert answer.text == (
        "data: 0\n\n"
        ": x-llumsched-instance: instance-0,instance-3\n"
        ": x-llumsched-migrations: 2\n\n"
        "data: [DONE]\n\n"
    )


def test_every_instance_of_a_request_of_several_sequences_is_named() -> None:
    provenance = Provenance()
    provenance.placed(Where(instance=2))
    provenance.placed(Where(instance=0))
    told = dict(provenance.headers("latency", is_complete=False))
    assert told[b"x-llumsched-instance"] == b"instance-0,instance-2"


@pytest.mark.parametrize("path", ["/whole", "/stream"])
def test_nothing_is_said_where_the_admin_api_is_off(path: str) -> None:
    answer = client(is_told=False).post(path)
    assert not told(answer.headers)
    assert "x-llumsched" not in answer.text


def test_an_answer_that_needed_no_instance_says_nothing() -> None:
    here = client()
    assert not told(here.get("/health").headers)
    assert not told(here.post("/rejected").headers)


def test_a_part_of_a_stream_that_is_not_its_end_is_as_it_was() -> None:
    provenance = Provenance()
    provenance.placed(Where())
    assert provenance.with_comment(b"data: 1\n\n") == b"data: 1\n\n"
    assert provenance.with_comment(b"data: 1\n\n" + DONE).startswith(b"data: 1\n\n: x-llum")
