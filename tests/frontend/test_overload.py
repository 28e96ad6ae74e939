"""Clients that are turned away are told when to come again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import Message
from vllm.exceptions import VLLMValidationError

from llumsched.core.actions import Rejection
from llumsched.core.types import Allowance, Budget
from llumsched.frontend.request.rejection import (
    Rejected,
    RetryAfterMiddleware,
    allowed,
    placed,
    turned_away,
)
from llumsched.rate_limits import duration


def answer(status: int, retry_after_s: float | None, headers: dict[str, str]) -> Response:
    async def endpoint(_: Request) -> Response:
        try:
            raise Rejected("the queue is full", retry_after_s)
        except Rejected as error:
            turned_away(error)
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


def test_rejections_do_not_disturb_each_other() -> None:
    assert answer(503, 30.0, {}).headers["retry-after"] == "30"
    assert answer(503, 2.0, {}).headers["retry-after"] == "2"
    assert Rejected("outside of any request", 1.0).http_status == 503


def test_whose_fault_it_is() -> None:
    assert Rejected("too many of yours", 1.0, Rejection.CLIENT_LIMIT).http_status == 429
    assert Rejected("too long", None, Rejection.TOO_LONG).http_status == 400


# ---- streams -------------------------------------------------------------------------------

SCOPE = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}


def as_vllm_streams(place: Callable[[], Awaitable[None]], num_tokens: int = 2) -> Response:
    """Begins before the request is placed; what goes wrong later is an event."""

    async def events() -> AsyncIterator[str]:
        try:
            await place()
            for token in range(num_tokens):
                yield f"data: {token}\n\n"
        except (Rejected, VLLMValidationError) as error:
            yield f"data: {error}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def served(response: Callable[[], Response]) -> RetryAfterMiddleware:
    async def endpoint(_: Request) -> Response:
        return response()

    return RetryAfterMiddleware(Starlette(routes=[Route("/", endpoint, methods=["POST"])]))


async def is_placed() -> None:
    placed()


async def is_rejected() -> None:
    error = Rejected("the queue is full", 2.3)
    turned_away(error)
    raise error


@pytest.mark.parametrize("num_rejections", [1, 2])
def test_a_stream_that_is_turned_away_is_answered_as_any_other_request(num_rejections: int) -> None:
    async def place() -> None:
        for _ in range(num_rejections - 1):
            turned_away(Rejected("as full for the other sequence", 1.0))
        await is_rejected()

    answer = TestClient(served(lambda: as_vllm_streams(place))).post("/")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "3"
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == (503, "Service Unavailable")
    assert "full" in error["message"]


def test_a_stream_that_is_placed_is_untouched() -> None:
    answer = TestClient(served(lambda: as_vllm_streams(is_placed))).post("/")
    assert answer.status_code == 200
    assert answer.text == "data: 0\n\ndata: 1\n\ndata: [DONE]\n\n"


def test_a_rejection_of_a_later_sequence_is_an_event() -> None:
    async def place() -> None:
        placed()
        await is_rejected()

    answer = TestClient(served(lambda: as_vllm_streams(place))).post("/")
    assert answer.status_code == 200
    assert "the queue is full" in answer.text


def test_a_stream_without_a_request_begins_with_its_first_event() -> None:
    async def place() -> None:
        pass

    answer = TestClient(served(lambda: as_vllm_streams(place))).post("/")
    assert answer.status_code == 200
    assert answer.text == "data: 0\n\ndata: 1\n\ndata: [DONE]\n\n"


def test_a_stream_begins_when_it_is_placed_and_not_before() -> None:
    async def scenario() -> None:
        may_place, may_compute = asyncio.Event(), asyncio.Event()
        sent: asyncio.Queue[Message] = asyncio.Queue()

        async def place() -> None:
            await may_place.wait()
            placed()
            await may_compute.wait()

        async def receive() -> Message:
            await asyncio.Event().wait()
            raise AssertionError

        app = served(lambda: as_vllm_streams(place, num_tokens=1))
        answering = asyncio.create_task(app(dict(SCOPE), receive, sent.put))
        for _ in range(20):
            await asyncio.sleep(0)
        assert sent.empty()
        may_place.set()
        async with asyncio.timeout(10.0):
            head = await sent.get()
        assert (head["type"], head["status"]) == ("http.response.start", 200)
        assert sent.empty()
        may_compute.set()
        async with asyncio.timeout(10.0):
            await answering
        bodies = [sent.get_nowait() for _ in range(sent.qsize())]
        assert b"".join(m["body"] for m in bodies) == b"data: 0\n\ndata: [DONE]\n\n"

    asyncio.run(scenario())


def test_a_client_that_leaves_before_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        async def place() -> None:
            await asyncio.Event().wait()

        sent: asyncio.Queue[Message] = asyncio.Queue()
        messages: list[Message] = [
            {"type": "http.request", "body": b"", "more_body": False},
            {"type": "http.disconnect"},
        ]

        async def receive() -> Message:
            await asyncio.sleep(0.01)
            return messages.pop(0) if len(messages) > 1 else messages[0]

        app = served(lambda: as_vllm_streams(place))
        async with asyncio.timeout(10.0):
            await app(dict(SCOPE), receive, sent.put)
        await asyncio.sleep(0)
        assert sent.empty()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


@pytest.mark.parametrize("is_rejected_too", [False, True])
def test_a_stream_tells_what_is_left_of_its_client_s_quota(is_rejected_too: bool) -> None:
    async def place() -> None:
        allowed(Allowance(requests=Budget(limit=60, remaining=0, reset_s=59.5)))
        await (is_rejected() if is_rejected_too else is_placed())

    response = TestClient(served(lambda: as_vllm_streams(place))).post("/")
    assert (response.status_code == 200) is not is_rejected_too
    told = {k: v for k, v in response.headers.items() if k.startswith("x-ratelimit")}
    assert told == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
    }


def test_a_whole_answer_tells_it_too() -> None:
    async def endpoint(_: Request) -> Response:
        allowed(Allowance(tokens=Budget(limit=1000, remaining=7, reset_s=0.12)))
        return JSONResponse({})

    app = RetryAfterMiddleware(Starlette(routes=[Route("/", endpoint)]))
    headers = TestClient(app).get("/").headers
    assert headers["x-ratelimit-remaining-tokens"] == "7"
    assert headers["x-ratelimit-reset-tokens"] == "120ms"
    assert "x-ratelimit-limit-requests" not in headers


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (-1.0, "0s"), (0.0171, "18ms"), (1, "1s"), (59.1, "1m0s"), (360, "6m0s")],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text
    assert duration(3600) == "1h0m0s"
