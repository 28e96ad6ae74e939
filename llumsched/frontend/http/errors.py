"""Answers that no route of vLLM's gives, in the shape of OpenAI's errors: 401, 404 and 405.

vLLM answers a missing key with ``{"error": "Unauthorized"}`` and an unknown path with ``{"detail":
"Not Found"}``; clients of OpenAI read ``error.message``. An error that has the shape already, and
every other answer, passes unchanged.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

KINDS = {401: "AuthenticationError", 404: "NotFoundError", 405: "MethodNotAllowedError"}


class ErrorShapeMiddleware:
    """Gives these answers their shape; to be outside of what checks keys."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held: list[Message] = []

        async def reshape(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in KINDS:
                held.append(message)
            elif not held:
                await send(message)
            else:
                held.append(message)
                if not message.get("more_body", False):
                    await _answer(scope, receive, send, held)

        await self._app(scope, receive, reshape)


async def _answer(scope: Scope, receive: Receive, send: Send, held: list[Message]) -> None:
    """Send what was held, or the same in OpenAI's shape."""
    start, *parts = held
    if _has_shape(b"".join(part.get("body", b"") for part in parts)):
        for message in held:
            await send(message)
        return
    status = start["status"]
    said = {
        401: "This path wants an API key: send it as 'Authorization: Bearer KEY'.",
        404: f"There is no path {scope['path']}. GET /openapi.json lists them.",
        405: f"{scope['path']} does not take {scope['method']}.",
    }
    error = {"message": said[status], "type": KINDS[status], "param": None, "code": status}
    response = JSONResponse({"error": error}, status)
    for name, value in start.get("headers", ()):
        if name.lower() not in (b"content-length", b"content-type"):
            response.raw_headers.append((name, value))
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    await response(scope, receive, send)


def _has_shape(body: bytes) -> bool:
    try:
        answer: Any = json.loads(body)
    except ValueError:
        return False
    return isinstance(answer, dict) and isinstance(answer.get("error"), dict)
