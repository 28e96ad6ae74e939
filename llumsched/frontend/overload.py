"""Requests that are turned away, and when their client should come back.

A rejection is vLLM's own kind of error, so it has OpenAI's shape; this adds the ``Retry-After``
header, which vLLM's handlers have no place for. The middleware and whoever rejects meet in a
context variable, for a server may turn a request away deep inside vLLM's own code.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.exceptions import GracefulHTTPError

from llumsched.core.actions import Rejection

DEFAULT_RETRY_AFTER_S = 1.0

_TURNED_AWAY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_retry_after_s: ContextVar[list[float] | None] = ContextVar("retry_after_s", default=None)


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
        told = _retry_after_s.get()
        if told is not None and retry_after_s:
            told.append(retry_after_s)


class RetryAfterMiddleware:
    """Says in a header when a client that was turned away should come back, in whole seconds."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told: list[float] = []
        _retry_after_s.set(told)

        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in _TURNED_AWAY:
                headers = list(message.get("headers", ()))
                if all(name.lower() != b"retry-after" for name, _ in headers):
                    seconds = math.ceil(max(told, default=DEFAULT_RETRY_AFTER_S))
                    message["headers"] = [*headers, (b"retry-after", str(seconds).encode())]
            await send(message)

        await self._app(scope, receive, send_with_header)
