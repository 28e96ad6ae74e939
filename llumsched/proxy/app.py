"""HTTP of the proxy: the OpenAI API of all servers, health, metrics, and the admin API."""

from __future__ import annotations

import hmac
import json
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

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
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(
    fleet: Fleet,
    session: aiohttp.ClientSession,
    *,
    api_keys: Sequence[str] = (),
    admin_api: bool = True,
    batch_url: str | None = None,
    continues_streams: bool = False,
) -> web.Application:
    """The application.

    Args:
        api_keys: those that clients must have one of, if there are any.
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
        _add_admin(app, fleet)
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
            given = request.headers.get("Authorization", "").removeprefix("Bearer ").encode()
            if not any(hmac.compare_digest(given, key.encode()) for key in api_keys):
                return error_response(HTTPStatus.UNAUTHORIZED, "Give one of the server's API keys.")
        try:
            return await handler(request)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            return error_response(HTTPStatus(error.status), error.text or error.reason)

    return authorize


def _add_admin(app: web.Application, fleet: Fleet) -> None:
    async def instances(request: web.Request) -> web.Response:
        return web.json_response(_describe(fleet))

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
        try:
            body = await request.json()
            url = body["url"]
            options = [f"{k}={v}" for k, v in body.items() if k != "url"]
            server = fleet.add(parse_backend(",".join([url, *options])))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            message = 'The body must be an object with the key "url".'
            return error_response(HTTPStatus.BAD_REQUEST, message)
        except (BackendError, ValueError) as error:
            return error_response(HTTPStatus.BAD_REQUEST, str(error))
        return web.json_response({"instance_id": server.server_id}, status=202)

    async def drain(request: web.Request) -> web.Response:
        server_id = request.match_info["server_id"]
        body = await request.json() if request.can_read_body else {}
        deadline_s = body.get("deadline_s") if isinstance(body, dict) else None
        if deadline_s is not None and not isinstance(deadline_s, int | float):
            return error_response(HTTPStatus.BAD_REQUEST, "'deadline_s' must be seconds.")
        try:
            fleet.drain(server_id, deadline_s)
        except KeyError:
            known = ", ".join(sorted(fleet.servers)) or "none"
            message = f"No instance '{server_id}' is running. There are: {known}."
            return error_response(HTTPStatus.NOT_FOUND, message)
        return web.json_response({"instance_id": server_id, "replace": False}, status=202)

    async def migrate(request: web.Request) -> web.Response:
        return error_response(HTTPStatus.CONFLICT, f"Not migrated: {NO_MIGRATION}.")

    app.router.add_get("/llumsched/instances", instances)
    app.router.add_get("/llumsched/requests", requests)
    app.router.add_post("/llumsched/backends", add)
    app.router.add_post("/llumsched/instances/{server_id}/drain", drain)
    app.router.add_post("/llumsched/migrations", migrate)


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
        "policy_failures": {},
        "config_file": None,
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
