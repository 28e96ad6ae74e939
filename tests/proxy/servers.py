"""Plain OpenAI servers that do as a test says, and a proxy before them, all in one event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import BaseTestServer, TestClient, TestServer

from llumsched.config import loads
from llumsched.proxy import server as plain
from llumsched.proxy.app import make_app
from llumsched.proxy.backends import Backend, parse_backend
from llumsched.proxy.fleet import Fleet

LONG_S = 20.0
Condition = Callable[[], bool]


@dataclass(slots=True)
class FakeServer:
    """A server whose answers are streams of `num_events` events, each let go by `allowed`."""

    models: list[str] = field(default_factory=lambda: ["model"])
    metrics: str = ""
    num_events: int = 3
    status: int = 200
    health: int = 200
    allowed: asyncio.Semaphore | None = None
    """Where it is given, each event after the first waits for a release."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_left: int = 0
    """Clients that left before their answer was whole."""
    http: BaseTestServer | None = None

    _port: int | None = None

    @property
    def url(self) -> str:
        # A server that has ended has none any more.
        if self._port is None:
            assert self.http is not None
            self._port = self.http.port
        return f"http://127.0.0.1:{self._port}"

    @property
    def server_id(self) -> str:
        return self.url.removeprefix("http://")

    def backend(self, options: str = "") -> Backend:
        return parse_backend(self.url + options)

    async def die(self) -> None:
        """End at once, with all its connections."""
        assert self.http is not None
        assert self.http.runner is not None
        server = self.http.runner.server
        assert isinstance(server, web.Server)
        for connection in server.connections:
            if connection.transport is not None:
                connection.transport.abort()
        await self.http.close()

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/{path:.+}", self._answer)
        return app

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=self.health)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in self.models]})

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.metrics)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        if self.status != 200:
            return web.json_response({"error": {"message": "no"}}, status=self.status)
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Own": "1"})
        await answer.prepare(request)
        try:
            for number in range(self.num_events):
                if number and self.allowed is not None:
                    await self.allowed.acquire()
                await answer.write(self.event(number))
            await answer.write(b"data: [DONE]\n\n")
        except (ConnectionError, asyncio.CancelledError):
            self.num_left += 1
            raise
        return answer

    def event(self, number: int) -> bytes:
        return f"data: {json.dumps({'text': f'{number} of {self.server_id}'})}\n\n".encode()

    def whole(self) -> bytes:
        """The bytes of a whole answer."""
        return b"".join(map(self.event, range(self.num_events))) + b"data: [DONE]\n\n"


@dataclass(slots=True)
class Proxied:
    """A proxy and its client."""

    fleet: Fleet
    client: TestClient[Any, Any]

    async def ask(
        self, prompt: str = "hello", model: str | None = "model", **fields: Any
    ) -> aiohttp.ClientResponse:
        """The head of an answer."""
        headers = fields.pop("headers", None)
        body = {"model": model, "prompt": prompt, "stream": True, **fields}
        return await self.client.post("/v1/completions", json=body, headers=headers)

    async def until(self, condition: Condition) -> None:
        """Wait for it, or fail."""
        await until(condition)

    async def until_serving(self, *servers: FakeServer) -> None:
        """Wait until requests may go to all of these."""
        await until(
            lambda: all(
                server.server_id in self.fleet.servers
                and self.fleet.servers[server.server_id].is_there
                and self.fleet.servers[server.server_id].last_load is not None
                for server in servers
            )
        )


async def until(condition: Condition) -> None:
    """Wait for it, or fail."""
    async with asyncio.timeout(LONG_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@asynccontextmanager
async def proxied(
    *servers: FakeServer,
    config: str = "policy: least_requests",
    options: str = "",
    **settings: Any,
) -> AsyncIterator[Proxied]:
    """A proxy before these servers, when all serve."""
    async with AsyncExitStack() as stack:
        for server in servers:
            server.http = TestServer(server.app())
            await server.http.start_server()
            stack.push_async_callback(server.http.close)
        timeout = aiohttp.ClientTimeout(total=LONG_S)
        session = await stack.enter_async_context(
            aiohttp.ClientSession(auto_decompress=False, timeout=timeout)
        )
        probes = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
        fleet = Fleet(loads(config), probes)
        stack.push_async_callback(fleet.close)
        for server in servers:
            fleet.add(server.backend(options))
        app = make_app(fleet, session, **settings)
        http = TestServer(app)
        await http.start_server()
        client = await stack.enter_async_context(TestClient(http))
        found = Proxied(fleet, client)
        await found.until_serving(*servers)
        yield found


def watch_often(monkeypatch: Any) -> None:
    """Look at servers a hundred times a second."""
    monkeypatch.setattr(plain, "WATCH_INTERVAL_S", 0.01)
