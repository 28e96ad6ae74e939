"""Scheduling hints of a request on their way from the HTTP layer to the engine's client.

The OpenAI API has no place for them and vLLM's request none either, so they travel in a context
variable, within the one task that serves the request.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from llumsched.hints import NO_HINTS, SchedulingHints, parse

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

_current: ContextVar[SchedulingHints] = ContextVar("llumsched_hints", default=NO_HINTS)


def current() -> SchedulingHints:
    """The hints of the HTTP request that the running task serves."""
    return _current.get()


@contextmanager
def hinted(hints: SchedulingHints) -> Iterator[None]:
    """Make them ``current`` while this lasts, here and in tasks begun meanwhile."""
    token = _current.set(hints)
    try:
        yield
    finally:
        _current.reset(token)


def let_keys_name_clients(app: FastAPI) -> None:
    """Have the API key of a request say whose it is; for a server with several."""
    app.state.llumsched_key_names_client = True


class SchedulingHintsMiddleware:
    """ASGI middleware that makes a request's hints ``current``; 400 where they cannot be read."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            hints = parse(scope["headers"], key_names_client=_key_names_client(scope))
        except ValueError as error:
            await _bad_request(str(error))(scope, receive, send)
            return
        with hinted(hints):
            await self._app(scope, receive, send)


def _key_names_client(scope: Scope) -> bool:
    return getattr(scope["app"].state, "llumsched_key_names_client", False)


def _bad_request(message: str) -> JSONResponse:
    error = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
    return JSONResponse({"error": error}, 400)
