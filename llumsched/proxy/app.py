"""HTTP of the proxy: the OpenAI API of all servers, health, metrics, and the admin API."""

from __future__ import annotations

import hmac
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Annotated, Any

import aiohttp
import msgspec
from aiohttp import web

from llumsched.batch.bodies import json_object
from llumsched.batch.pass_on import PATHS, BatchServer, BatchServerAway, passed_on
from llumsched.core.types import PriorityClass
from llumsched.proxy.adapters import Adapters
from llumsched.proxy.backends import BackendError, parse_backend
from llumsched.proxy.errors import error_response
from llumsched.proxy.fleet import Fleet
from llumsched.proxy.forwarding import Forwarder
from llumsched.proxy.metrics import ProxyMetrics
from llumsched.proxy.server import PlainServer

MOST_BODY_BYTES = 64 * 2**20
NO_MIGRATION = "a plain server cannot hand its requests over"
NO_REPLACEMENT = (
    "a proxy starts no servers; add one with POST /llumsched/backends, and drain one with"
    " 'llumsched drain HOST:PORT'"
)
NO_TRACE = (
    "A proxy keeps no history of requests: the x-llumsched headers of an answer say its server, the"
    " policy and the reason."
)
NO_LIVE_PAGE = "A proxy has no live page: 'llumsched status --watch' shows its servers."
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class DrainBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /llumsched/instances/{server_id}/drain``, which may be left out."""

    deadline_s: Seconds | None = None
    replace: bool = False


def make_app(
    fleet: Fleet,
    session: aiohttp.ClientSession,
    *,
    api_keys: Sequence[str] = (),
    admin_api: bool = True,
    batch_url: str | None = None,
    continues_streams: bool = False,
    config_file: str | None = None,
) -> web.Application:
    """The application.

    Args:
        api_keys: those that clients must have one of, if there are any.
        config_file: the scheduler's configuration, if it is not that of a bundle alone.
        batch_url: where files and batches are served, if they are.
        continues_streams: a stream whose server is lost goes on from the text delivered.
    """
    metrics = ProxyMetrics(fleet)
    adapters = Adapters(fleet, session)
    forwarder = Forwarder(
        fleet,
        adapters,
        session,
        metrics,
        tells_provenance=admin_api,
        continues_streams=continues_streams,
        key_names_client=len(api_keys) > 1,
    )
    app = web.Application(
        client_max_size=MOST_BODY_BYTES, middlewares=[_authorization(tuple(api_keys))]
    )

    async def health(request: web.Request) -> web.Response:
        is_well = any(server.is_there for server in fleet.servers.values())
        return web.Response(status=200 if is_well else 503)

    async def models(request: web.Request) -> web.Response:
        served = {model for model, pool in fleet.pools.items() if pool.server_ids}
        entries = [
            {"id": model, "object": "model", "owned_by": "llumsched"}
            for model in sorted(served | adapters.names)
        ]
        return web.json_response({"object": "list", "data": entries})

    async def exposition(request: web.Request) -> web.Response:
        return web.Response(body=metrics.page(), content_type="text/plain", charset="utf-8")

    app.router.add_get("/health", health)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/metrics", exposition)
    if batch_url is not None:
        _pass_batches_on(app, batch_url)
    adapters.add_routes(app.router)
    app.router.add_post("/v1/{path:.+}", forwarder.handle)
    if admin_api:
        _add_admin(app, fleet, config_file)
    return app


def _pass_batches_on(app: web.Application, url: str) -> None:
    server = BatchServer(url)

    async def pass_on(request: web.Request) -> web.StreamResponse:
        body = request.content.iter_any() if request.can_read_body else None
        path = request.rel_url.raw_path_qs
        try:
            async with server.ask(request.method, path, request.headers, body) as upstream:
                answer = web.StreamResponse(
                    status=upstream.status, headers=passed_on(upstream.headers)
                )
                await answer.prepare(request)
                async for chunk in upstream.content.iter_any():
                    await answer.write(chunk)
                await answer.write_eof()
                return answer
        except BatchServerAway as error:
            return error_response(error.status, str(error))

    async def close(app: web.Application) -> None:
        await server.close()

    for path in PATHS:
        for method in ("GET", "POST", "DELETE"):
            app.router.add_route(method, path, pass_on)
            app.router.add_route(method, f"{path}/{{rest:.+}}", pass_on)
    app.on_cleanup.append(close)


def _authorization(api_keys: tuple[str, ...]) -> Any:
    @web.middleware
    async def authorize(request: web.Request, handler: Handler) -> web.StreamResponse:
        is_open = request.path in ("/health", "/metrics")
        if api_keys and not is_open:
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            given_bytes = given.encode("utf-8", "surrogateescape")
            if not any(hmac.compare_digest(given_bytes, key.encode()) for key in api_keys):
                return error_response(HTTPStatus.UNAUTHORIZED, "Give one of the server's API keys.")
        try:
            return await handler(request)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            return error_response(HTTPStatus(error.status), _said(request, error))

    return authorize


def _said(request: web.Request, error: web.HTTPException) -> str:
    """Sentence of an error, also where aiohttp has a status alone."""
    if error.text not in (None, f"{error.status}: {error.reason}"):
        return str(error.text)
    match error:
        case web.HTTPNotFound():
            return f"There is no path {request.path} at this proxy."
        case web.HTTPMethodNotAllowed():
            return f"{request.path} does not take {request.method}."
        case _:
            return error.reason


def _add_admin(app: web.Application, fleet: Fleet, config_file: str | None) -> None:
    async def instances(request: web.Request) -> web.Response:
        return web.json_response(_describe(fleet) | {"config_file": config_file})

    async def requests(request: web.Request) -> web.Response:
        found = [
            {
                "request_id": request_id,
                "instance_id": server.server_id,
                "num_output_tokens": sent.num_output_tokens,
                "num_moves": 0,
            }
            for server in fleet.servers.values()
            for request_id, sent in server.sent.items()
        ]
        return web.json_response({"requests": found})

    async def add(request: web.Request) -> web.Response:
        body = await json_object(request)
        url = body.get("url")
        if not isinstance(url, str):
            message = 'The body must be an object with the key "url".'
            return error_response(HTTPStatus.BAD_REQUEST, message)
        options = [f"{k}={v}" for k, v in body.items() if k != "url"]
        try:
            server = fleet.add(parse_backend(",".join([url, *options])))
        except (BackendError, ValueError) as error:
            return error_response(HTTPStatus.BAD_REQUEST, str(error))
        return web.json_response({"instance_id": server.server_id}, status=202)

    async def drain(request: web.Request) -> web.Response:
        server_id = request.match_info["server_id"]
        try:
            data = await request.read()
            body = msgspec.json.decode(data, type=DrainBody) if data else DrainBody()
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return error_response(HTTPStatus.BAD_REQUEST, f"{error}.")
        if body.replace:
            return error_response(HTTPStatus.CONFLICT, f"Not drained: {NO_REPLACEMENT}.")
        try:
            fleet.drain(server_id, body.deadline_s)
        except KeyError:
            known = ", ".join(sorted(fleet.servers)) or "none"
            message = f"No instance '{server_id}' is running. There are: {known}."
            return error_response(HTTPStatus.NOT_FOUND, message)
        return web.json_response({"instance_id": server_id, "replace": False}, status=202)

    def refuse(method: str, path: str, sentence: str) -> None:
        async def refused(request: web.Request) -> web.Response:
            return error_response(HTTPStatus.CONFLICT, sentence)

        app.router.add_route(method, path, refused)

    app.router.add_get("/llumsched/instances", instances)
    app.router.add_get("/llumsched/requests", requests)
    app.router.add_post("/llumsched/backends", add)
    app.router.add_post("/llumsched/instances/{server_id}/drain", drain)
    refuse("POST", "/llumsched/migrations", f"Not migrated: {NO_MIGRATION}.")
    refuse("POST", "/llumsched/scale", f"Not scaled: {NO_REPLACEMENT}.")
    refuse("GET", "/llumsched/requests/{request_id}/trace", NO_TRACE)
    refuse("GET", "/llumsched/live", NO_LIVE_PAGE)
    refuse("GET", "/llumsched/", NO_LIVE_PAGE)


def _describe(fleet: Fleet) -> dict[str, Any]:
    """The pool in the shape that `llumsched status` reads."""
    views = {view.instance_id: view for pool in fleet.pools.values() for view in pool.snapshot()}
    now_s = time.monotonic()
    queued: dict[str, int] = {}
    for pool in fleet.pools.values():
        for priority, number in pool.num_held_by_class.items():
            name = PriorityClass(priority).name.lower()
            queued[name] = queued.get(name, 0) + number
    policies = {pool.policy for pool in fleet.pools.values()}
    return {
        "policy": ", ".join(sorted(policies)) or "none yet",
        "instances": [
            _server(server, views.get(server_id), now_s)
            for server_id, server in sorted(fleet.servers.items())
        ],
        "migrations": {},
        "queued": queued,
        "policy_failures": dict(fleet.policy_failures),
        "berths": [
            {
                "instance_id": server.server_id,
                "node": None,
                "state": "running" if server.is_there else "away",
                "num_deaths": 0,
                "last_failure": server.last_failure,
                "retry_in_s": None,
            }
            for server in fleet.servers.values()
        ],
        "frontends": [],
    }


def _server(server: PlainServer, view: Any, now_s: float) -> dict[str, Any]:
    state = "draining" if server.is_draining else "serving" if server.is_there else "away"
    freeness = None if view is None or not math.isfinite(view.freeness) else view.freeness
    load = server.last_load
    return {
        "instance_id": server.server_id,
        "state": state,
        "role": server.backend.role,
        "engine": server.engine,
        "models": list(server.models),
        "last_failure": server.last_failure,
        "freeness": freeness,
        "report_age_s": None if server.reported_s is None else now_s - server.reported_s,
        "load": None if load is None else msgspec.to_builtins(load),
        "cannot_migrate": "",
    }
