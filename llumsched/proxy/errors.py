"""Errors as OpenAI's API has them."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from aiohttp import web


def error_response(
    status: HTTPStatus, message: str, retry_after_s: float | None = None
) -> web.Response:
    """An answer that is an error; its client should come back after `retry_after_s`."""
    headers = {} if retry_after_s is None else {"Retry-After": str(max(1, round(retry_after_s)))}
    return web.json_response(error_body(status, message), status=status, headers=headers)


def error_body(status: HTTPStatus, message: str) -> dict[str, Any]:
    """The object of such an answer, or of an event."""
    kind = {
        HTTPStatus.BAD_REQUEST: "BadRequestError",
        HTTPStatus.UNAUTHORIZED: "AuthenticationError",
        HTTPStatus.NOT_FOUND: "NotFoundError",
        HTTPStatus.TOO_MANY_REQUESTS: "RateLimitError",
    }.get(status, "ServiceUnavailableError")
    return {"error": {"message": message, "type": kind, "param": None, "code": int(status)}}
