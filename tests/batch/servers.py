"""An endpoint that does as a test says, and the batch process before it, in one event loop."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from llumsched.batch.app import add_routes, middleware
from llumsched.batch.database import Database
from llumsched.batch.endpoint import Endpoint
from llumsched.batch.worker import Worker, WorkerOptions

LONG_S = 60.0
URL = "/v1/completions"
FAST = WorkerOptions(first_backoff_s=0.01, most_backoff_s=0.02, most_failures=3)


def input_line(number: int, **body: Any) -> str:
    """A line of an input file."""
    content = {"model": "model", "prompt": str(number), **body}
    line = {"custom_id": f"c{number}", "method": "POST", "url": URL, "body": content}
    return json.dumps(line)


def input_file(num_lines: int) -> bytes:
    """An input file."""
    return "\n".join(map(input_line, range(num_lines))).encode()


@dataclass(slots=True)
class FakeEndpoint:
    """Answers a completion with its prompt, after as many failures as `failing` says."""

    failing: dict[str, list[int]] = field(default_factory=dict)
    """Prompt -> statuses of its first answers."""
    allowed: asyncio.Semaphore | None = None
    """Where it is given, each answer waits for a release."""
    answer_s: float = 0.0
    asked: Counter[str] = field(default_factory=Counter)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_left: int = 0
    """Clients that left before their answer."""
    described: dict[str, Any] | None = None
    num_wanted: int | None = None

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post(URL, self._answer)
        app.router.add_get("/llumsched/instances", self._describe)
        app.router.add_post("/llumsched/scale", self._scale)
        return app

    async def _answer(self, request: web.Request) -> web.Response:
        prompt = (await request.json())["prompt"]
        self.asked[prompt] += 1
        self.headers.append(dict(request.headers))
        statuses = self.failing.get(prompt)
        if statuses:
            return web.json_response({"error": {"message": "no"}}, status=statuses.pop(0))
        try:
            if self.allowed is not None:
                await self.allowed.acquire()
            await asyncio.sleep(self.answer_s)
        except asyncio.CancelledError:
            self.num_left += 1
            raise
        return web.json_response({"choices": [{"text": f"answer {prompt}"}]})

    async def _describe(self, request: web.Request) -> web.Response:
        if self.described is None:
            return web.Response(status=404)
        return web.json_response(self.described)

    async def _scale(self, request: web.Request) -> web.Response:
        self.num_wanted = (await request.json())["num_instances"]
        self.described = {"berths": [{"state": "running"}] * self.num_wanted}
        return web.json_response({}, status=202)


@dataclass(slots=True)
class Process:
    """The batch process without its command line."""

    database: Database
    worker: Worker
    endpoint: Endpoint
    client: TestClient[Any, Any]
    now: float = 1_000_000.0
    """Time on the clock of the batch process, in seconds."""

    async def upload(self, content: bytes, status: int = 200, **headers: str) -> Any:
        """The answer to an upload."""
        form = web_form(content)
        async with self.client.post("/v1/files", data=form, headers=headers) as answer:
            found = await answer.json()
            assert answer.status == status, found
            return found

    async def create(self, file_id: str, status: int = 200, **changes: Any) -> Any:
        """The answer to a new batch of a file."""
        body = {"input_file_id": file_id, "endpoint": URL, "completion_window": "24h", **changes}
        async with self.client.post("/v1/batches", json=body) as answer:
            found = await answer.json()
            assert answer.status == status, found
            return found

    async def get(self, path: str, status: int = 200) -> Any:
        """A JSON answer."""
        async with self.client.get(path) as answer:
            found = await answer.json()
            assert answer.status == status, found
            return found

    async def lines(self, file_id: str) -> list[dict[str, Any]]:
        """The lines of a file."""
        async with self.client.get(f"/v1/files/{file_id}/content") as answer:
            assert answer.status == 200
            return [json.loads(line) for line in (await answer.text()).splitlines()]

    async def until(self, batch_id: str, *statuses: str) -> Any:
        """The batch, once it has one of these statuses."""
        async with asyncio.timeout(LONG_S):
            while True:
                batch = await self.get(f"/v1/batches/{batch_id}")
                if batch["status"] in statuses:
                    return batch
                self.now += 0.02
                await asyncio.sleep(0.02)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it, or fail."""
    async with asyncio.timeout(LONG_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def web_form(content: bytes) -> Any:
    """The form of an upload."""
    import aiohttp

    form = aiohttp.FormData()
    form.add_field("purpose", "batch")
    form.add_field("file", content, filename="a.jsonl")
    return form


@asynccontextmanager
async def batching(
    fake: FakeEndpoint,
    folder: Path,
    *,
    options: WorkerOptions = FAST,
    works: bool = True,
    keys: tuple[str, ...] = (),
    most_lines: int = 10_000,
) -> AsyncIterator[Process]:
    """The process before an endpoint."""
    async with AsyncExitStack() as stack:
        server = TestServer(fake.app(), handler_cancellation=True)
        await server.start_server()
        stack.push_async_callback(server.close)
        database = Database(f"sqlite:///{folder}/batch.db")
        database.create()
        stack.callback(database.close)
        endpoint = Endpoint(f"http://127.0.0.1:{server.port}/v1")
        stack.push_async_callback(endpoint.close)
        found: list[Process] = []
        worker = Worker(database, endpoint, options, lambda: found[0].now)
        app = web.Application(middlewares=[middleware(keys, ())])
        add_routes(app, database, worker.metrics, worker.wake, most_lines, lambda: found[0].now)
        http = TestServer(app)
        await http.start_server()
        client = await stack.enter_async_context(TestClient(http))
        found.append(Process(database, worker, endpoint, client))
        if works:
            working = asyncio.create_task(worker.run())
            stack.push_async_callback(_end, working)
        yield found[0]


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
