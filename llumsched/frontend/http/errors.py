"""Answers that no route of vLLM's gives, in the shape of OpenAI's errors: 401, 404 and 405.

vLLM answers a missing key with ``{"error": "Unauthorized"}`` and an unknown path with ``{"detail":
"Not Found"}``; clients of OpenAI read ``error.message``. Every other answer passes unchanged.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

KINDS = {401: "AuthenticationError", 404: "NotFoundError", 405: "MethodNotAllowedError"}
NO_KEY = "This path wants an API key: send it as 'Authorization: Bearer KEY'."


def error(status: int, message: str) -> JSONResponse:
    """An error in OpenAI's shape."""
    kind = KINDS.get(status, "BadRequestError")
    content = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": content}, status)


def shape_errors(app: FastAPI) -> None:
    """Answer paths and methods that the app has not; call before it serves."""

    async def answer(request: Request, raised: Exception) -> JSONResponse:
        assert isinstance(raised, HTTPException)
        if raised.status_code == 404:
            message = f"There is no path {request.url.path}. GET /openapi.json lists them."
        elif raised.status_code == 405:
            message = f"{request.url.path} does not take {request.method}."
        else:
            message = str(raised.detail)
        response = error(raised.status_code, message)
        response.headers.update(raised.headers or {})
        return response

    app.add_exception_handler(HTTPException, answer)


class UnauthorizedMiddleware:
    """Gives the answer to a request without a key its shape; to be outside of what checks keys."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_refused = False

        async def reshape(message: Message) -> None:
            nonlocal is_refused
            if message["type"] == "http.response.start" and message["status"] == 401:
                is_refused = True
                response = error(401, NO_KEY)
                response.headers["WWW-Authenticate"] = "Bearer"
                await response(scope, receive, send)
            elif not is_refused:
                await send(message)

        await self._app(scope, receive, reshape)
