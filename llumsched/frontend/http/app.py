"""vLLM's OpenAI app with the admin API, served."""

from __future__ import annotations

import argparse
import logging
import socket
from collections.abc import Awaitable, Callable, MutableSequence
from typing import Any

import vllm.envs as envs
from fastapi import APIRouter
from prometheus_client import CollectorRegistry
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import serve_http
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config

from llumsched.access import warning_of
from llumsched.batch.pass_on import BatchServer
from llumsched.engine.vllm.compat import accepted
from llumsched.frontend.http.api_keys import guard, num_keys
from llumsched.frontend.http.batches import batch_router
from llumsched.frontend.http.errors import ErrorShapeMiddleware
from llumsched.frontend.http.exposition import expose
from llumsched.frontend.options.arguments import is_local
from llumsched.frontend.request.hints import SchedulingHintsMiddleware, let_keys_name_clients
from llumsched.frontend.request.rejection import RetryAfterMiddleware, tell_provenance
from llumsched.frontend.routing.engine import Engine

logger = logging.getLogger(__name__)

MIDDLEWARE = (SchedulingHintsMiddleware, RetryAfterMiddleware, ErrorShapeMiddleware)
# How long connections may take to close once their requests have ended.
CLOSING_TIMEOUT_S = 3


async def serve_app(
    args: argparse.Namespace,
    engine: Engine,
    admin: APIRouter | None,
    registry: CollectorRegistry,
    listen_address: str,
    sock: socket.socket,
    begins: Callable[[], None],
    policy: str,
    peer_loads: tuple[MutableSequence[int], int] | None = None,
) -> Any:
    """vLLM's ``build_and_serve``, with the admin routes added to its app, until a signal ends it.

    Args:
        admin: the admin API, if it is served.
        registry: of the metrics that are shown.
        begins: called when all is ready.
        policy: the bundle in force.
        peer_loads: connections of all frontends at this socket, and this one's index: the next
            connection is for the one that has the fewest.

    Returns:
        what is to be awaited for the connections to close.
    """
    supported_tasks = await engine.get_supported_tasks()
    # Its flag for middleware: once built, the app takes no more.
    args.middleware = [
        *args.middleware,
        *(f"{m.__module__}.{m.__name__}" for m in MIDDLEWARE),
    ]
    app = build_app(args, supported_tasks, engine.model_config)
    expose(app, engine.engine_core.labels, registry)
    batch_server = None if args.batch_url is None else BatchServer(args.batch_url)
    if batch_server is not None:
        app.include_router(batch_router(batch_server))
    if admin is not None:
        app.include_router(admin)
        tell_provenance(app, policy)
    guard(app)
    if num_keys(args) > 1:
        let_keys_name_clients(app)
    warning = warning_of(
        args.admin_api,
        is_local=is_local(args),
        has_keys=num_keys(args) > 0,
        address=listen_address,
    )
    if warning is not None:
        logger.warning("%s", warning)
    await init_app_state(engine, app.state, args, supported_tasks)
    log_config = get_uvicorn_log_config(args)
    uvicorn_options: dict[str, Any] = {} if log_config is None else {"log_config": log_config}
    begins()
    closing = await serve_http(
        app,
        sock=sock,
        enable_ssl_refresh=args.enable_ssl_refresh,
        **accepted(serve_http, peer_loads=peer_loads),
        host=args.host,
        port=args.port,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        timeout_graceful_shutdown=engine.vllm_config.shutdown_timeout + CLOSING_TIMEOUT_S,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers,
        h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
        h11_max_header_count=args.h11_max_header_count,
        **uvicorn_options,
    )
    return closing if batch_server is None else _closed(closing, batch_server)


async def _closed(closing: Awaitable[None], batch_server: BatchServer) -> None:
    await closing
    await batch_server.close()
