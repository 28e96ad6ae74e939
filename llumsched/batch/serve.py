"""The batch process: HTTP, a worker, and other parts that share both, in one event loop."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from aiohttp import web

from llumsched.batch.app import DEFAULT_MOST_LINES, add_routes, middleware
from llumsched.batch.database import DEFAULT_URL, Database
from llumsched.batch.endpoint import Endpoint
from llumsched.batch.worker import Worker, WorkerOptions

logger = logging.getLogger(__name__)

DEFAULT_PORT = 8100
SHUTDOWN_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Settings of the process."""

    endpoint_url: str
    endpoint_key: str | None = None
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    database_url: str = DEFAULT_URL
    client_keys: Sequence[str] = ()
    admin_keys: Sequence[str] = ()
    most_lines: int = DEFAULT_MOST_LINES
    request_timeout_s: float = 3600.0
    worker: WorkerOptions = field(default_factory=WorkerOptions)


class Part(Protocol):
    """Something else that the process does."""

    def add_routes(self, app: web.Application) -> None:
        """Add its paths."""

    async def run(self) -> None:
        """Work until cancelled."""


MakePart = Callable[[Database, Endpoint, Worker], Part]


async def serve(options: ServeOptions, make_parts: Sequence[MakePart] = ()) -> None:
    """Serve until a signal.

    Args:
        make_parts: of what the process does besides.

    Raises:
        DatabaseError: the database cannot be used.
        OSError: the port cannot be had.
    """
    database = Database(options.database_url)
    await asyncio.to_thread(database.create)
    endpoint = Endpoint(
        options.endpoint_url, options.endpoint_key, timeout_s=options.request_timeout_s
    )
    worker = Worker(database, endpoint, options.worker)
    app = web.Application(middlewares=[middleware(options.client_keys, options.admin_keys)])
    add_routes(app, database, worker.metrics, worker.wake, options.most_lines)
    app.router.add_get("/health", _health)
    parts = [make(database, endpoint, worker) for make in make_parts]
    for part in parts:
        part.add_routes(app)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S)
    await runner.setup()
    tasks: list[asyncio.Task[None]] = []
    try:
        await web.TCPSite(runner, options.host, options.port).start()
        tasks += [asyncio.create_task(part.run()) for part in parts]
        tasks.append(asyncio.create_task(worker.run()))
        where = database.engine.url.render_as_string(hide_password=True)
        logger.info(
            "batches at http://%s:%d for %s, in %s",
            options.host,
            options.port,
            endpoint.url,
            where,
        )
        await _signalled(tasks)
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        await runner.cleanup()
        await endpoint.close()
        database.close()
    for error in ended:
        if isinstance(error, Exception):
            raise error


async def _health(request: web.Request) -> web.Response:
    return web.Response()


async def _signalled(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait for a signal, or for a task to end, which none does by itself unless it fails."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, event.set)
    signalled = asyncio.create_task(event.wait())
    await asyncio.wait([signalled, *tasks], return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
