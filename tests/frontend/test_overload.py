"""Clients that are turned away are told when to come again."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
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


def test_rejections_do_not_disturb_each_other() -> None:
    assert answer(503, 30.0, {}).headers["retry-after"] == "30"
    assert answer(503, 2.0, {}).headers["retry-after"] == "2"
    assert Rejected("outside of any request", 1.0).http_status == 503


def test_whose_fault_it_is() -> None:
    assert Rejected("too many of yours", 1.0, Rejection.CLIENT_LIMIT).http_status == 429
    assert Rejected("too long", None, Rejection.TOO_LONG).http_status == 400
