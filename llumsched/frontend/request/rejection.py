"""Requests that are turned away, and when their client should come back.

A rejection is vLLM's own kind of error, so it has OpenAI's shape; this adds headers that vLLM's
handlers have no place for: ``Retry-After``, and what is left of the client's quota where it has
one. The middleware and whoever rejects meet in a context variable, for a server may turn a request
away deep inside vLLM's own code.

vLLM begins a streamed answer before its engine has seen the request, so a rejection would be an
event in a stream of status 200, which no client tries again and no proxy counts; so would be a
mistake of the client's that only the engine's client sees. Here the head of a
streamed answer is held until the request has its instance, or is rejected. Once it has one, the
head goes out as it does from plain vLLM: before the first token.
"""

from __future__ import annotations

import asyncio
import math
from contextvars import ContextVar
from http import HTTPStatus

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GracefulHTTPError

from llumsched.core.actions import Rejection
from llumsched.core.types import Allowance
from llumsched.frontend.request.provenance import Placed, Provenance
from llumsched.rate_limits import rate_limit_headers

DEFAULT_RETRY_AFTER_S = 1.0

_TURNED_AWAY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_answering: ContextVar[_Answering | None] = ContextVar("answering", default=None)


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
        self.retry_after_s = retry_after_s


def turned_away(rejection: Rejected) -> None:
    """Let the answer to the request that this is called for be the rejection."""
    answering = _answering.get()
    if answering is not None:
        answering.rejected(rejection, rejection.retry_after_s)


def refused(mistake: Exception) -> None:
    """Let the answer to the request that this is called for be its client's mistake."""
    answering = _answering.get()
    if answering is not None:
        answering.rejected(mistake, None)


def placed(route: Placed | None = None) -> None:
    """The request that this is called for has its instance: its stream may begin."""
    answering = _answering.get()
    if answering is not None:
        if route is not None:
            answering.provenance.placed(route)
        answering.settled.set()


def reasoned(reason: str) -> None:
    """The scheduler has said why the request that this is called for goes where it goes."""
    answering = _answering.get()
    if answering is not None:
        answering.provenance.reasoned(reason)


def allowed(allowance: Allowance) -> None:
    """The client of the request that this is called for may still ask for so much."""
    answering = _answering.get()
    if answering is not None:
        answering.allowance = allowance


def tell_provenance(app: FastAPI, policy: str) -> None:
    """Have answers say in headers where they come from; ``policy`` is the bundle in force."""
    app.state.llumsched_policy = policy


class RetryAfterMiddleware:
    """Answers a streamed request that is turned away as any other, and says in a header when its
    client should come back, in whole seconds."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answering = _Answering(scope, receive, send)
        _answering.set(answering)
        try:
            await self._app(scope, receive, answering.send)
        finally:
            answering.close()


class _Answering:
    """One answer on its way out. A request may be of several sequences; the first that has its
    instance, or is rejected, settles how the answer begins."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.settled = asyncio.Event()
        self.provenance = Provenance()
        self.allowance: Allowance | None = None
        self._policy: str | None = _policy_told(scope)
        self._is_stream = False
        self._scope, self._receive, self._send = scope, receive, send
        self._rejection: Exception | None = None
        self._retry_after_s: list[float] = []
        self._held: Message | None = None
        self._releasing: asyncio.Task[None] | None = None
        self._is_replaced = False
        self._sending = asyncio.Lock()

    def rejected(self, rejection: Exception, retry_after_s: float | None) -> None:
        if retry_after_s:
            self._retry_after_s.append(retry_after_s)
        if not self.settled.is_set():
            self._rejection = rejection
            self.settled.set()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._is_stream = _is_event_stream(message)
            if self._is_stream and not self.settled.is_set():
                self._held = message
                self._releasing = asyncio.create_task(self._release_when_settled())
                return
            self._add_limits(message)
            self._add_provenance(message)
        elif self._releasing is not None:
            if not self._releasing.done():
                await self._release()
            if self._is_replaced:
                return  # the rejection as an event, and the end of the stream
        if self._is_stream and self._policy is not None and message["type"] == "http.response.body":
            message["body"] = self.provenance.with_comment(message.get("body", b""))
        await self._send(message)

    def close(self) -> None:
        if self._releasing is not None:
            self._releasing.cancel()

    async def _release_when_settled(self) -> None:
        await self.settled.wait()
        await self._release()

    async def _release(self) -> None:
        """Send the head that is held, or all of a rejection in its place."""
        async with self._sending:
            held, self._held = self._held, None
            if held is None:
                return
            if self._rejection is None:
                self._add_limits(held)
                self._add_provenance(held)
                await self._send(held)
                return
            self._is_replaced = True
            error = create_error_response(self._rejection)
            response = JSONResponse(error.model_dump(), error.error.code)
            await response(self._scope, self._receive, self._send_with_limits)

    async def _send_with_limits(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._add_limits(message)
        await self._send(message)

    def _add_provenance(self, message: Message) -> None:
        if self._policy is not None:
            told = self.provenance.headers(self._policy, is_complete=not self._is_stream)
            message["headers"] = [*message.get("headers", ()), *told]

    def _add_limits(self, message: Message) -> None:
        """The rest of the client's quota, and when one that is turned away should come back."""
        headers = list(message.get("headers", ()))
        if self.allowance is not None:
            told = rate_limit_headers(self.allowance)
            headers += [(name.encode(), value.encode()) for name, value in told.items()]
            message["headers"] = headers
        if message["status"] not in _TURNED_AWAY:
            return
        if all(name.lower() != b"retry-after" for name, _ in headers):
            seconds = math.ceil(max(self._retry_after_s, default=DEFAULT_RETRY_AFTER_S))
            message["headers"] = [*headers, (b"retry-after", str(seconds).encode())]


def _policy_told(scope: Scope) -> str | None:
    """The policy that answers name in their headers, if they are to."""
    policy: str | None = getattr(getattr(scope.get("app"), "state", None), "llumsched_policy", None)
    return policy


def _is_event_stream(message: Message) -> bool:
    content_type = Headers(raw=list(message.get("headers", ()))).get("content-type", "")
    return message["status"] == HTTPStatus.OK and content_type.startswith("text/event-stream")
