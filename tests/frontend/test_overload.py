"""Clients that are turned away are told when to come again."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from llumsched.core.actions import Rejection
from llumsched.frontend.overload import Rejected, RetryAfterMiddleware


def answer(status: int, retry_after_s: float | None, headers: dict[str, str]) -> Response:
    async def endpoint(_: Request) -> Response:
        try:
            raise Rejected("the queue is full", retry_after_s)
        except Rejected as error:
            return JSONResponse({"error": {"message": str(error)}}, status, headers)

    app = RetryAfterMiddleware(Starlette(routes=[Route("/", endpoint)]))
    return TestClient(app).get("/")  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("status", "retry_after_s", "headers", "expected"),
    [
        (503, 2.3, {}, "3"),
        (429, 1.0, {}, "1"),
        (503, None, {}, "1"),
        (503, 2.3, {"Retry-After": "9"}, "9"),
        (200, 2.3, {}, None),
        (500, 2.3, {}, None),
    ],
)
def test_retry_after_goes_with_what_can_be_tried_again(
    status: int, retry_after_s: float | None, headers: dict[str, str], expected: str | None
) -> None:
    assert answer(status, retry_after_s, headers).headers.get("retry-after") == expected


def stream(*events: str, rejected: Rejection | None = None) -> Response:
    """What a client gets of a streamed answer that vLLM has begun already."""

    async def generate() -> AsyncIterator[str]:
        if rejected is not None:
            Rejected("the queue is full", 2.3, rejected)
        for event in events:
            yield f"data: {event}\n\n"

    async def endpoint(_: Request) -> Response:
        return StreamingResponse(generate(), media_type="text/event-stream")

    app = RetryAfterMiddleware(Starlette(routes=[Route("/", endpoint)]))
    return TestClient(app).get("/")  # type: ignore[return-value]


ERROR = '{"error": {"message": "No instance can take it", "code": 503}}'


@pytest.mark.parametrize(
    ("rejection", "status", "retry_after"),
    [
        (Rejection.OVERLOADED, 503, "3"),
        (Rejection.CLIENT_LIMIT, 429, "3"),
        (Rejection.TOO_LONG, 400, None),
    ],
)
def test_a_stream_that_is_rejected_before_it_said_anything_has_the_status_of_it(
    rejection: Rejection, status: int, retry_after: str | None
) -> None:
    answer = stream(ERROR, "[DONE]", rejected=rejection)
    assert answer.status_code == status
    assert answer.headers.get("retry-after") == retry_after
    assert answer.headers["content-type"] == "application/json"
    assert answer.text == ERROR  # type: ignore[attr-defined]


def test_other_streams_are_passed_on_as_they_are() -> None:
    for events, rejected in (
        (("{}", "[DONE]"), None),
        ((ERROR, "[DONE]"), None),  # an instance's, not the scheduler's
        (("{}", ERROR), Rejection.OVERLOADED),  # one sequence of several
        ((), None),
    ):
        answer = stream(*events, rejected=rejected)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.text == "".join(f"data: {event}\n\n" for event in events)  # type: ignore[attr-defined]


def test_rejections_do_not_disturb_each_other() -> None:
    assert answer(503, 30.0, {}).headers["retry-after"] == "30"
    assert answer(503, 2.0, {}).headers["retry-after"] == "2"
    assert Rejected("outside of any request", 1.0).http_status == 503


def test_whose_fault_it_is() -> None:
    assert Rejected("too many of yours", 1.0, Rejection.CLIENT_LIMIT).http_status == 429
    assert Rejected("too long", None, Rejection.TOO_LONG).http_status == 400
