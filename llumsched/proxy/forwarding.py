"""A client's request on its way to a server, and the answer on its way back, byte for byte.

Before the first byte of an answer a request is tried again, elsewhere if the policy says so. After
it the answer cannot begin anew: a stream whose server fails is continued from the text delivered if
that is asked for and possible, and else ends with an error event as OpenAI's API has it; any other
answer ends with a closed connection.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus

import aiohttp
import msgspec
from aiohttp import web

from llumsched.batch.pass_on import passed_on
from llumsched.core.actions import DispatchRequest, Rejection
from llumsched.core.types import Allowance, SchedulingRequest, priority_class
from llumsched.hints import parse
from llumsched.proxy.adapters import AdapterError, Adapters
from llumsched.proxy.continuation import CONTINUES_CHAT, Delivery, delivery_of
from llumsched.proxy.errors import error_body, error_response
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


class _Broken(Exception):
    """A server failed in the middle of an answer; its client has not been told."""

    def __init__(self, server_id: str) -> None:
        super().__init__(f"The server {server_id} failed in the middle of the answer.")


@dataclass(slots=True, kw_only=True)
class _Call:
    """A client's request with what becomes of it, over all tries."""

    request: web.Request
    body: bytes
    facts: RequestFacts
    pool: ModelPool
    scheduled: SchedulingRequest
    begun_s: float
    delivery: Delivery | None
    """Of a stream that can be continued."""
    allowance: Allowance | None = None
    num_placed: int = 0
    answer: web.StreamResponse | None = None
    """The answer, once it has begun."""


class Forwarder:
    """Args:
    fleet: the servers.
    adapters: those that are loaded at the servers when they are asked for.
    session: for requests; without a limit on connections and without decompression.
    metrics: what is counted.
    tells_provenance: answers name server, policy and reason in headers.
    continues_streams: what is left of a stream whose server is lost is asked of another.
    key_names_client: a request's API key says whose it is, whatever a header does.
    """

    def __init__(
        self,
        fleet: Fleet,
        adapters: Adapters,
        session: aiohttp.ClientSession,
        metrics: ProxyMetrics,
        *,
        tells_provenance: bool,
        continues_streams: bool,
        key_names_client: bool,
    ) -> None:
        self._fleet = fleet
        self._adapters = adapters
        self._session = session
        self._metrics = metrics
        self._tells_provenance = tells_provenance
        self._continues_streams = continues_streams
        self._key_names_client = key_names_client

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """The answer to `POST /v1/...`."""
        body = await request.read()
        try:
            facts = facts_of(body)
        except MalformedRequest as error:
            return error_response(HTTPStatus.BAD_REQUEST, str(error))
        try:
            pool = await self._pool(facts.model)
        except AdapterError as error:
            return error_response(error.status, str(error))
        if pool is None:
            known = ", ".join(sorted(self._fleet.pools)) or "none yet"
            message = f"The model '{facts.model}' is not served. There are: {known}."
            return error_response(HTTPStatus.NOT_FOUND, message)
        begun_s = time.monotonic()
        call = _Call(
            request=request,
            body=body,
            facts=facts,
            pool=pool,
            scheduled=_scheduled(request, facts, self._key_names_client, begun_s),
            begun_s=begun_s,
            delivery=self._delivery(request, body, facts),
        )
        last = _Failed("all of them have left")
        for _ in range(MOST_TRIES):
            try:
                async with self._placed(call) as (server, placed, sent):
                    return await self._forward(call, server, placed, sent)
            except TurnedAway as rejection:
                self._metrics.turned_away()
                return _rejection(rejection)
            except _Failed as failure:
                last = failure
            except _Broken as broken:
                return await self._continued(call, broken)
        if last.answer is not None:
            return last.answer
        return error_response(HTTPStatus.BAD_GATEWAY, f"No server answered: {last}.")

    async def _pool(self, model: str | None) -> ModelPool | None:
        if model is None and len(self._fleet.pools) == 1:
            return next(iter(self._fleet.pools.values()))
        pool = self._fleet.pools.get(model or "")
        if pool is None or not pool.server_ids:
            await self._adapters.ensure(model)
        return self._fleet.pools.get(model or "")

    def _delivery(self, request: web.Request, body: bytes, facts: RequestFacts) -> Delivery | None:
        if not (self._continues_streams and facts.stream):
            return None
        return delivery_of(request.path, json.loads(body))

    @contextlib.asynccontextmanager
    async def _placed(
        self, call: _Call
    ) -> AsyncIterator[tuple[PlainServer, DispatchRequest, Sent]]:
        """The server for a try; while this lasts the request counts as one of it.

        Raises:
            TurnedAway: the scheduler rejects it.
            _Failed: the server has just left.
        """
        call.num_placed += 1
        scheduled = _of_try(call)
        placed = await call.pool.place(scheduled, is_admitted=call.num_placed > 1)
        if call.num_placed == 1:
            call.allowance = placed.allowance
        server = self._fleet.servers.get(placed.instance_id)
        if server is None:
            call.pool.aborted(scheduled.request_id)
            raise _Failed(f"{placed.instance_id} has left")
        sent = Sent(
            num_prompt_tokens=scheduled.num_prompt_tokens,
            priority=scheduled.execution_priority,
            model=call.facts.model,
        )
        server.used_s[call.facts.model or ""] = time.monotonic()
        server.sent[scheduled.request_id] = sent
        is_whole = False
        try:
            yield server, placed, sent
            is_whole = True
        except _Failed:
            self._metrics.failed(server.server_id, "before the first byte")
            raise
        finally:
            del server.sent[scheduled.request_id]
            if is_whole:
                call.pool.finished(scheduled.request_id, sent.num_output_tokens or None)
            else:
                call.pool.aborted(scheduled.request_id)

    async def _forward(
        self, call: _Call, server: PlainServer, placed: DispatchRequest, sent: Sent
    ) -> web.StreamResponse:
        async with self._asked(call, server, call.body) as upstream:
            headers = self._answer_headers(call, upstream.headers, placed)
            if upstream.status in RETRIED:
                content = await upstream.read()
                server.failed(f"answers {upstream.status}")
                raise _Failed(
                    f"{server.server_id} answers {upstream.status}",
                    web.Response(status=upstream.status, body=content, headers=headers),
                )
            chunks = upstream.content.iter_any()
            first = await anext(chunks, b"")
            self._begins(call, server, sent)
            self._metrics.first_byte(server.server_id, time.monotonic() - call.begun_s)
            if not _is_event_stream(upstream):
                call.delivery = None
            answer = web.StreamResponse(status=upstream.status, headers=headers)
            await answer.prepare(call.request)
            call.answer = answer
            await self._pass_on(call, answer, first, chunks, server, sent)
            return answer

    async def _continued(self, call: _Call, broken: _Broken) -> web.StreamResponse:
        """The rest of an answer, from another server if one gives it."""
        delivery, answer = call.delivery, call.answer
        assert answer is not None
        for _ in range(MOST_TRIES):
            if delivery is None or delivery.is_over or delivery.refusal is not None:
                break
            delivery.another_server()
            try:
                async with self._placed(call) as (server, _, sent):
                    await self._rest(call, delivery, answer, server, sent)
                self._metrics.continued(server.server_id)
                return answer
            except TurnedAway:
                break
            except _Broken as again:
                broken = again
            except _Failed as failure:
                logger.info("the rest of an answer is asked again: %s", failure)
        if delivery is not None and delivery.is_over:
            await answer.write(b"data: [DONE]\n\n")
            await answer.write_eof()
        elif call.facts.stream:
            event = json.dumps(error_body(HTTPStatus.BAD_GATEWAY, str(broken)))
            # An event that was cut off ends with the first empty line.
            await answer.write(f"\n\ndata: {event}\n\n".encode())
            await answer.write_eof()
        else:
            answer.force_close()
        return answer

    async def _rest(
        self,
        call: _Call,
        delivery: Delivery,
        answer: web.StreamResponse,
        server: PlainServer,
        sent: Sent,
    ) -> None:
        if delivery.is_chat and server.engine not in CONTINUES_CHAT:
            raise _Failed(f"{server.server_id} cannot go on with a message")
        async with self._asked(call, server, delivery.body()) as upstream:
            if not _is_event_stream(upstream):
                if upstream.status in RETRIED:
                    server.failed(f"answers {upstream.status}")
                raise _Failed(f"{server.server_id} answers {upstream.status}")
            chunks = upstream.content.iter_any()
            first = await anext(chunks, b"")
            self._begins(call, server, sent)
            logger.info("%s goes on with an answer of %s", server.server_id, call.facts.model)
            if self._tells_provenance:
                await answer.write(f": x-llumsched-instance: {server.server_id}\n\n".encode())
            await self._pass_on(call, answer, first, chunks, server, sent)

    @contextlib.asynccontextmanager
    async def _asked(
        self, call: _Call, server: PlainServer, body: bytes
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A server's answer to the request with this body.

        Raises:
            _Failed: it does not answer.
        """
        request = call.request
        headers = passed_on(request.headers)
        headers.update(server.headers)
        url = f"{server.backend.url}{request.rel_url}"
        try:
            async with self._session.request(
                request.method, url, data=body, headers=headers, allow_redirects=False
            ) as upstream:
                yield upstream
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if request.transport is None or request.transport.is_closing():
                # The client has left, which is not the server's fault.
                raise
            reason = str(error) or type(error).__name__
            is_dead = isinstance(error, aiohttp.ClientConnectorError)
            server.failed(reason, is_dead=is_dead)
            raise _Failed(f"{server.server_id}: {reason}") from error

    def _begins(self, call: _Call, server: PlainServer, sent: Sent) -> None:
        server.breaker.succeeded()
        sent.has_begun = True
        new, dropped = server.prefixes.compute(call.facts.prefix_hashes)
        call.pool.computes(server.server_id, new)
        if dropped:
            # Models of a server share its cache.
            for pool in self._fleet.pools.values():
                pool.drops(server.server_id, dropped)

    async def _pass_on(
        self,
        call: _Call,
        answer: web.StreamResponse,
        first: bytes,
        chunks: AsyncIterator[bytes],
        server: PlainServer,
        sent: Sent,
    ) -> None:
        """The rest of an answer, which has begun.

        Raises:
            _Broken: the server failed.
        """
        chunk, delivery = first, call.delivery
        while chunk:
            # Of a stream, an event is a token, as nearly every engine has it.
            sent.num_output_tokens += chunk.count(b"data: ") if call.facts.stream else 0
            await answer.write(chunk if delivery is None else delivery.feed(chunk))
            try:
                chunk = await anext(chunks, b"")
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                reason = str(error) or type(error).__name__
                server.failed(reason)
                self._metrics.failed(server.server_id, "after the first byte")
                logger.warning("%s failed in the middle of an answer: %s", server.server_id, reason)
                raise _Broken(server.server_id) from error
        if delivery is not None:
            await answer.write(delivery.rest())
        await answer.write_eof()

    def _answer_headers(
        self, call: _Call, upstream: Mapping[str, str], placed: DispatchRequest
    ) -> dict[str, str]:
        headers = passed_on(upstream)
        if call.allowance is not None:
            headers.update(rate_limit_headers(call.allowance))
        if self._tells_provenance:
            headers["x-llumsched-instance"] = placed.instance_id
            headers["x-llumsched-policy"] = call.pool.policy
            headers["x-llumsched-reason"] = placed.reason
        return headers


def _rejection(rejection: TurnedAway) -> web.Response:
    status = STATUS[rejection.rejection]
    wait_s = rejection.retry_after_s
    if wait_s is None and status is not HTTPStatus.BAD_REQUEST:
        wait_s = 1.0
    answer = error_response(status, f"No server can take the request: {rejection}.", wait_s)
    if rejection.allowance is not None:
        answer.headers.update(rate_limit_headers(rejection.allowance))
    return answer


def _scheduled(
    request: web.Request, facts: RequestFacts, key_names_client: bool, now_s: float
) -> SchedulingRequest:
    try:
        hints = parse(
            ((name.lower(), value) for name, value in request.raw_headers),
            key_names_client=key_names_client,
        )
    except ValueError as error:
        raise web.HTTPBadRequest(text=str(error)) from None
    priority = priority_class(facts.priority) if hints.priority is None else hints.priority
    return SchedulingRequest(
        request_id=request.headers.get("X-Request-Id") or uuid.uuid4().hex,
        num_prompt_tokens=facts.num_prompt_tokens,
        max_output_tokens=facts.max_output_tokens,
        scheduling_priority=priority,
        execution_priority=priority,
        arrival_s=now_s,
        client_id=hints.client_id,
        session_id=hints.session_id or facts.session_id,
        prefix_hashes=facts.prefix_hashes,
        ttft_slo_s=hints.ttft_slo_s,
        tpot_slo_s=hints.tpot_slo_s,
    )


def _of_try(call: _Call) -> SchedulingRequest:
    """The request as the scheduler sees its present try, which computes what was delivered too.

    Its name is one that no other try has, also where a client names its requests twice alike.
    """
    scheduled = call.scheduled
    num_delivered = 0 if call.delivery is None else call.delivery.num_tokens
    return msgspec.structs.replace(
        scheduled,
        request_id=f"{scheduled.request_id}#{call.num_placed}-{uuid.uuid4().hex[:8]}",
        num_prompt_tokens=scheduled.num_prompt_tokens + num_delivered,
    )


def _is_event_stream(upstream: aiohttp.ClientResponse) -> bool:
    """True of events that can be read as they come."""
    return (
        upstream.status == HTTPStatus.OK
        and upstream.content_type == "text/event-stream"
        and "Content-Encoding" not in upstream.headers
    )
