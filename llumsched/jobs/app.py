"""HTTP of jobs: list, history, pause, resume, run now; and, with an operator's key, change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from aiohttp import web

from llumsched.batch.app import error_response
from llumsched.batch.bodies import json_object
from llumsched.batch.database import Database
from llumsched.jobs import store
from llumsched.jobs.spec import SpecError, parse

MOST_RUNS = 1000


def add_routes(
    app: web.Application,
    database: Database,
    *,
    may_change: bool,
    clock: Callable[[], float] = time.time,
) -> None:
    """Add the paths of jobs.

    Args:
        may_change: jobs can be added and removed, which lets the caller have any request sent.
    """

    async def list_jobs(request: web.Request) -> web.Response:
        found = await asyncio.to_thread(store.describe_jobs, database, clock())
        return web.json_response({"jobs": found})

    async def history(request: web.Request) -> web.Response:
        text = request.query.get("limit", "20")
        if not (text.isascii() and text.isdigit() and 0 < int(text) <= MOST_RUNS):
            raise web.HTTPBadRequest(text=f"'limit' must be 1 to {MOST_RUNS}.")
        name = request.match_info["name"]
        found = await asyncio.to_thread(store.history, database, name, int(text))
        return web.json_response({"runs": found})

    async def run(request: web.Request) -> web.Response:
        run_id = request.match_info["run_id"]
        return web.json_response(await asyncio.to_thread(store.describe_run, database, run_id))

    async def run_now(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        run_ids = await asyncio.to_thread(store.run_now, database, name, clock())
        return web.json_response({"run_ids": run_ids}, status=HTTPStatus.ACCEPTED)

    def pausing(is_paused: bool) -> Any:
        async def pause(request: web.Request) -> web.Response:
            name = request.match_info["name"]
            await asyncio.to_thread(store.pause, database, name, clock(), is_paused=is_paused)
            return web.json_response({"name": name, "is_paused": is_paused})

        return pause

    async def put(request: web.Request) -> web.Response:
        body = await json_object(request)
        name = request.match_info["name"]
        try:
            job = parse({**body, "name": name})
            await asyncio.to_thread(store.put_one, database, job, clock())
        except SpecError as error:
            return error_response(HTTPStatus.BAD_REQUEST, str(error))
        return web.json_response({"name": name})

    async def delete(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        try:
            await asyncio.to_thread(store.delete, database, name)
        except SpecError as error:
            return error_response(HTTPStatus.CONFLICT, str(error))
        return web.json_response({"name": name, "deleted": True})

    app.router.add_get("/llumsched/jobs", list_jobs)
    app.router.add_get("/llumsched/jobs/{name}/runs", history)
    app.router.add_get("/llumsched/runs/{run_id}", run)
    app.router.add_post("/llumsched/jobs/{name}/run", run_now)
    app.router.add_post("/llumsched/jobs/{name}/pause", pausing(True))
    app.router.add_post("/llumsched/jobs/{name}/resume", pausing(False))
    if may_change:
        app.router.add_put("/llumsched/jobs/{name}", put)
        app.router.add_delete("/llumsched/jobs/{name}", delete)
