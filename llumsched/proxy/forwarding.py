"""A client's request on its way to a server, and the answer on its way back, byte for byte.

Before the first byte of an answer a request is tried again, elsewhere if the policy says so. After
it the answer cannot begin anew: a stream whose server fails ends with an error event as OpenAI's
API has it, any other answer with a closed connection.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import uuid
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from llumsched.batch.pass_on import passed_on
from llumsched.core.actions import DispatchRequest, Rejection
from llumsched.core.types import Allowance, PriorityClass, SchedulingRequest, priority_class
from llumsched.proxy.fleet import Fleet
from llumsched.proxy.metrics import ProxyMetrics
from llumsched.proxy.pool import ModelPool, TurnedAway
from llumsched.proxy.prompts import MalformedRequest, RequestFacts, facts_of
from llumsched.proxy.server import PlainServer, Sent
from llumsched.rate_limits import rate_limit_headers

logger = logging.getLogger(__name__)

MOST_TRIES = 3
RETRIED = frozenset(
    {
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)
STATUS = {
    Rejection.OVERLOADED: HTTPStatus.SERVICE_UNAVAILABLE,
    Rejection.CLIENT_LIMIT: HTTPStatus.TOO_MANY_REQUESTS,
    Rejection.TOO_LONG: HTTPStatus.BAD_REQUEST,
}


class _Failed(Exception):
    """A server failed a request before the first byte of its answer."""

    def __init__(self, reason: str, answer: web.Response | None = None) -> None:
        super().__init__(reason)
        self.answer = answer


class Forwarder:
    """Args:
    fleet: the servers.
    session: for requests; without a limit on connections and without decompression.
    metrics: what is counted.
    tells_provenance: answers name server, policy and reason in headers.
    """

    def __init__(
        self,
        fleet: Fleet,
        session: aiohttp.ClientSession,
        metrics: ProxyMetrics,
        *,
        tells_provenance: bool,
    ) -> None:
        self._fleet = fleet
        self._session = session
        self._metrics = metrics
        self._tells_provenance = tells_provenance

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """The answer to `POST /v1/...`."""
        body = await request.read()
        try:
            facts = facts_of(body)
        except MalformedRequest as error:
            return error_response(HTTPStatus.BAD_REQUEST, str(error))
        pool = self._pool(facts.model)
        if pool is None:
            known = ", ".join(sorted(self._fleet.pools)) or "none yet"
            message = f"The model '{facts.model}' is not served. There are: {known}."
            return error_response(HTTPStatus.NOT_FOUND, message)
        begun_s = time.monotonic()
        scheduled = _scheduled(request, facts, begun_s)
        allowance: Allowance | None = None
        for number_of_try in range(1, MOST_TRIES + 1):
            scheduled_try = _with_id(scheduled, number_of_try)
            try:
                placed = await pool.place(scheduled_try, is_admitted=number_of_try > 1)
            except TurnedAway as rejection:
                self._metrics.turned_away()
                return _rejection(rejection)
            if number_of_try == 1:
                allowance = placed.allowance
            server = self._fleet.servers.get(placed.instance_id)
            if server is None:
                pool.aborted(scheduled_try.request_id)
                continue
            try:
                with self._sent(pool, server, scheduled_try) as sent:
                    return await self._forward(
                        request, body, facts, pool, server, placed, allowance, sent, begun_s
                    )
            except _Failed as failure:
                self._metrics.failed(server.server_id, "before the first byte")
                last = failure
        if last.answer is not None:
            return last.answer
        return error_response(HTTPStatus.BAD_GATEWAY, f"No server answered: {last}.")

    def _pool(self, model: str | None) -> ModelPool | None:
        if model is None and len(self._fleet.pools) == 1:
            return next(iter(self._fleet.pools.values()))
        return self._fleet.pools.get(model or "")

    @contextlib.contextmanager
    def _sent(
        self, pool: ModelPool, server: PlainServer, scheduled: SchedulingRequest
    ) -> Iterator[Sent]:
        """While this lasts the request counts as one of the server's."""
        sent = Sent(
            num_prompt_tokens=scheduled.num_prompt_tokens, priority=scheduled.execution_priority
        )
        server.sent[scheduled.request_id] = sent
        is_whole = False
        try:
            yield sent
            is_whole = True
        finally:
            del server.sent[scheduled.request_id]
            if is_whole:
                pool.finished(scheduled.request_id, sent.num_output_tokens or None)
            else:
                pool.aborted(scheduled.request_id)

    async def _forward(
        self,
        request: web.Request,
        body: bytes,
        facts: RequestFacts,
        pool: ModelPool,
        server: PlainServer,
        placed: DispatchRequest,
        allowance: Allowance | None,
        sent: Sent,
        begun_s: float,
    ) -> web.StreamResponse:
        headers = passed_on(request.headers)
        headers.update(server.headers)
        url = f"{server.backend.url}{request.rel_url}"
        try:
            async with self._session.request(
                request.method, url, data=body, headers=headers, allow_redirects=False
            ) as upstream:
                answer_headers = self._answer_headers(upstream.headers, pool, placed, allowance)
                if upstream.status in RETRIED:
                    content = await upstream.read()
                    server.failed(f"answers {upstream.status}")
                    raise _Failed(
                        f"{server.server_id} answers {upstream.status}",
                        web.Response(status=upstream.status, body=content, headers=answer_headers),
                    )
                chunks = upstream.content.iter_any()
                first = await anext(chunks, b"")
                server.breaker.succeeded()
                sent.has_begun = True
                self._metrics.first_byte(server.server_id, time.monotonic() - begun_s)
                pool.computes(server.server_id, *server.prefixes.compute(facts.prefix_hashes))
                answer = web.StreamResponse(status=upstream.status, headers=answer_headers)
                await answer.prepare(request)
                await self._pass_on(answer, first, chunks, server, sent, facts.stream)
                return answer
        except _Failed:
            raise
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if request.transport is None or request.transport.is_closing():
                # The client has left, which is not the server's fault.
                raise
            reason = str(error) or type(error).__name__
            is_dead = isinstance(error, aiohttp.ClientConnectorError)
            server.failed(reason, is_dead=is_dead)
            raise _Failed(f"{server.server_id}: {reason}") from error

    async def _pass_on(
        self,
        answer: web.StreamResponse,
        first: bytes,
        chunks: Any,
        server: PlainServer,
        sent: Sent,
        is_stream: bool,
    ) -> None:
        """The rest of an answer, which has begun."""
        chunk = first
        try:
            while chunk:
                # Of a stream, an event is a token, as nearly every engine has it.
                sent.num_output_tokens += chunk.count(b"data: ") if is_stream else 0
                await answer.write(chunk)
                chunk = await self._next(chunks, server, answer, is_stream=is_stream)
        except _ServerLost:
            return
        await answer.write_eof()

    async def _next(
        self, chunks: Any, server: PlainServer, answer: web.StreamResponse, *, is_stream: bool
    ) -> bytes:
        try:
            return await anext(chunks, b"")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
            server.failed(reason)
            self._metrics.failed(server.server_id, "after the first byte")
            logger.warning("%s failed in the middle of an answer: %s", server.server_id, reason)
            if is_stream:
                message = f"The server {server.server_id} failed in the middle of the answer."
                event = json.dumps(_error(HTTPStatus.BAD_GATEWAY, message))
                # An event that was cut off ends with the first empty line.
                await answer.write(f"\n\ndata: {event}\n\n".encode())
                await answer.write_eof()
            else:
                answer.force_close()
            raise _ServerLost from error

    def _answer_headers(
        self,
        upstream: Mapping[str, str],
        pool: ModelPool,
        placed: DispatchRequest,
        allowance: Allowance | None,
    ) -> dict[str, str]:
        headers = passed_on(upstream)
        if allowance is not None:
            headers.update(rate_limit_headers(allowance))
        if self._tells_provenance:
            headers["x-llumsched-instance"] = placed.instance_id
            headers["x-llumsched-policy"] = pool.policy
            headers["x-llumsched-reason"] = placed.reason
        return headers


class _ServerLost(Exception):
    """A server failed after the first byte; the client has been told."""


def error_response(
    status: HTTPStatus, message: str, retry_after_s: float | None = None
) -> web.Response:
    """An error as OpenAI's API has it."""
    headers = {} if retry_after_s is None else {"Retry-After": str(max(1, round(retry_after_s)))}
    return web.json_response(_error(status, message), status=status, headers=headers)


def _error(status: HTTPStatus, message: str) -> dict[str, Any]:
    kind = {
        HTTPStatus.BAD_REQUEST: "BadRequestError",
        HTTPStatus.UNAUTHORIZED: "AuthenticationError",
        HTTPStatus.NOT_FOUND: "NotFoundError",
        HTTPStatus.TOO_MANY_REQUESTS: "RateLimitError",
    }.get(status, "ServiceUnavailableError")
    return {"error": {"message": message, "type": kind, "param": None, "code": int(status)}}


def _rejection(rejection: TurnedAway) -> web.Response:
    status = STATUS[rejection.rejection]
    wait_s = rejection.retry_after_s
    if wait_s is None and status is not HTTPStatus.BAD_REQUEST:
        wait_s = 1.0
    answer = error_response(status, f"No server can take the request: {rejection}.", wait_s)
    if rejection.allowance is not None:
        answer.headers.update(rate_limit_headers(rejection.allowance))
    return answer


def _scheduled(request: web.Request, facts: RequestFacts, now_s: float) -> SchedulingRequest:
    named = request.headers.get("X-Request-Priority")
    try:
        priority = priority_class(facts.priority) if named is None else PriorityClass.parse(named)
    except ValueError as error:
        raise web.HTTPBadRequest(text=f"X-Request-Priority: {error}") from None
    return SchedulingRequest(
        request_id=request.headers.get("X-Request-Id") or uuid.uuid4().hex,
        num_prompt_tokens=facts.num_prompt_tokens,
        max_output_tokens=facts.max_output_tokens,
        scheduling_priority=priority,
        execution_priority=priority,
        arrival_s=now_s,
        client_id=request.headers.get("X-Client-Id") or facts.session_id,
        prefix_hashes=facts.prefix_hashes,
    )


def _with_id(scheduled: SchedulingRequest, number_of_try: int) -> SchedulingRequest:
    """A name that no other try has, also where a client names its requests twice alike."""
    name = f"{scheduled.request_id}#{number_of_try}-{uuid.uuid4().hex[:8]}"
    return msgspec.structs.replace(scheduled, request_id=name)
