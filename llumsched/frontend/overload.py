"""Requests that are turned away, and when their client should come back.

A rejection is vLLM's own kind of error, so it has OpenAI's shape; this adds the ``Retry-After``
header, which vLLM's handlers have no place for. The middleware and whoever rejects meet in a
context variable, for a server may turn a request away deep inside vLLM's own code.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.exceptions import GracefulHTTPError

from llumsched.core.actions import Rejection

DEFAULT_RETRY_AFTER_S = 1.0

_TURNED_AWAY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


@dataclass(slots=True)
class _Told:
    """What the rejections of a request have said, and the status of the last of them."""

    retry_after_s: list[float] = field(default_factory=list)
    status: HTTPStatus | None = None


_told: ContextVar[_Told | None] = ContextVar("told", default=None)

STATUS = {
    Rejection.OVERLOADED: HTTPStatus.SERVICE_UNAVAILABLE,
    Rejection.CLIENT_LIMIT: HTTPStatus.TOO_MANY_REQUESTS,
    Rejection.TOO_LONG: HTTPStatus.BAD_REQUEST,
}


class Rejected(GracefulHTTPError):
    """The scheduler rejects the request; vLLM's server answers with `STATUS` and the reason."""

    def __init__(
        self,
        reason: str,
        retry_after_s: float | None,
        rejection: Rejection = Rejection.OVERLOADED,
    ) -> None:
        hint = f" Try again in {math.ceil(retry_after_s)} s." if retry_after_s else ""
        super().__init__(f"No instance can take the request: {reason}.{hint}", STATUS[rejection])
        told = _told.get()
        if told is None:
            return
        told.status = STATUS[rejection]
        if retry_after_s:
            told.retry_after_s.append(retry_after_s)


class RetryAfterMiddleware:
    """Says in a header when a client that was turned away should come back, in whole seconds.

    vLLM begins a streamed answer before it is known whether there will be one, and would say in it
    that there is not. Here it begins with its first words: if they are that the scheduler rejected
    the request, the answer is the status and the body that it would be without streaming.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = _Told()
        _told.set(told)
        held_back: Message | None = None
        is_over = False

        async def send_or_turn_away(message: Message) -> None:
            nonlocal held_back, is_over
            if is_over:
                return
            if message["type"] == "http.response.start":
                if message["status"] == HTTPStatus.OK and _is_event_stream(message):
                    held_back = message
                    return
                _add_retry_after(message, told)
            elif held_back is not None:
                begin, held_back = held_back, None
                error = _error_in(message) if told.status is not None else None
                if error is not None:
                    is_over = True
                    begin = {
                        "type": "http.response.start",
                        "status": int(told.status or HTTPStatus.SERVICE_UNAVAILABLE),
                        "headers": [
                            (b"content-type", b"application/json"),
                            (b"content-length", str(len(error)).encode()),
                        ],
                    }
                    _add_retry_after(begin, told)
                    message = {"type": "http.response.body", "body": error}
                await send(begin)
            await send(message)

        await self._app(scope, receive, send_or_turn_away)


def _add_retry_after(start: Message, told: _Told) -> None:
    headers = list(start.get("headers", ()))
    if start["status"] in _TURNED_AWAY and all(
        name.lower() != b"retry-after" for name, _ in headers
    ):
        seconds = math.ceil(max(told.retry_after_s, default=DEFAULT_RETRY_AFTER_S))
        start["headers"] = [*headers, (b"retry-after", str(seconds).encode())]


def _is_event_stream(start: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in start.get("headers", ())
    )


def _error_in(first: Message) -> bytes | None:
    """The error that a stream begins with, as JSON."""
    event = first.get("body", b"")
    error: bytes = event.removeprefix(b"data: ").strip()
    return error if event.startswith(b'data: {"error"') else None
