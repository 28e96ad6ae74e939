"""Scheduling hints that a client gives with its request, in HTTP headers.

| header | value | means |
|---|---|---|
| `X-Request-Priority` | `high`, `normal`, `low` | its class, whatever `priority` in the body says |
| `X-SLO-TTFT-Ms` | milliseconds | the client wants its first token within this |
| `X-SLO-TPOT-Ms` | milliseconds | the client wants further tokens this far apart |
| `X-Client-Id` | any text | whose request it is; else the API key's digest |

With several API keys a client is whoever has one: a header of its own choice cannot make it many.
The OpenAI API has no place for them and vLLM's request none either, so they travel in a context
variable from the HTTP layer to the engine client, within the one task that serves the request.
This module does not know what a policy makes of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from llumsched.core.types import PriorityClass

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

PRIORITY = b"x-request-priority"
TTFT_SLO = b"x-slo-ttft-ms"
TPOT_SLO = b"x-slo-tpot-ms"
CLIENT_ID = b"x-client-id"
AUTHORIZATION = b"authorization"
MAX_CLIENT_ID_LENGTH = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingHints:
    """``priority`` is ``None`` where the request's body decides."""

    priority: PriorityClass | None = None
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    client_id: str | None = None


NO_HINTS = SchedulingHints()
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


def parse(
    headers: Iterable[tuple[bytes, bytes]], *, key_names_client: bool = False
) -> SchedulingHints:
    """The hints in a request's headers, whose names are in lower case.

    Args:
        key_names_client: its API key says whose a request is, whatever a header does.

    Raises:
        ValueError: a header that is ours says something else; the message names the fix.
    """
    found = {name: value for name, value in headers if name in _NAMES}
    if not found:
        return NO_HINTS
    texts = {name: value.decode("latin-1").strip() for name, value in found.items()}
    priority = texts.get(PRIORITY)
    try:
        priority_class = PriorityClass.parse(priority) if priority is not None else None
    except ValueError as error:
        raise ValueError(f"X-Request-Priority: {error}") from None
    return SchedulingHints(
        priority=priority_class,
        ttft_slo_s=_seconds("X-SLO-TTFT-Ms", texts.get(TTFT_SLO)),
        tpot_slo_s=_seconds("X-SLO-TPOT-Ms", texts.get(TPOT_SLO)),
        client_id=_client_id(texts, key_names_client),
    )


def _seconds(name: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not (math.isfinite(milliseconds) and milliseconds > 0):
        raise ValueError(f"{name}: {text!r} is not a positive number of milliseconds")
    return milliseconds / 1000


def _client_id(texts: dict[bytes, str], key_names_client: bool) -> str | None:
    authorization, client_id = texts.get(AUTHORIZATION), texts.get(CLIENT_ID)
    if client_id and len(client_id) > MAX_CLIENT_ID_LENGTH:
        raise ValueError(f"X-Client-Id: longer than {MAX_CLIENT_ID_LENGTH} characters")
    if client_id and not (key_names_client and authorization):
        return client_id
    if authorization:
        # Not the scheme before it, which may be spelled in many ways.
        key = authorization.partition(" ")[2] or authorization
        # The key itself must not reach logs.
        return hashlib.sha256(key.encode()).hexdigest()[:16]
    return None


def let_keys_name_clients(app: FastAPI) -> None:
    """Have the API key of a request say whose it is; for a server with several."""
    app.state.llumsched_key_names_client = True


_NAMES = frozenset({PRIORITY, TTFT_SLO, TPOT_SLO, CLIENT_ID, AUTHORIZATION})


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
