"""Kinds of job: an HTTP request, another number of instances, or a batch.

A run returns what its log says at its end, and raises `RunFailed` with the reason if it failed.
One whose process died is begun again, so an HTTP request may be sent twice; a batch is not made
twice, since its id comes from its run's.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp

from llumsched.batch import files, store
from llumsched.batch.app import DEFAULT_MOST_LINES, PART_LINES
from llumsched.batch.database import Database
from llumsched.batch.endpoint import Away, Endpoint
from llumsched.batch.lines import LineError
from llumsched.batch.states import OPEN, Status
from llumsched.jobs.spec import HttpRequest, Scale, SubmitBatch
from llumsched.jobs.store import Run

POLL_INTERVAL_S = 1.0
MOST_SAID = 2000
OWNER = ""
Say = Callable[[str], Awaitable[None]]


class RunFailed(Exception):
    """A run failed; the message says why."""


class Doer:
    """Does runs. `clock` gives seconds since the epoch."""

    def __init__(
        self,
        database: Database,
        endpoint: Endpoint,
        created: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._endpoint = endpoint
        self._created = created
        self._clock = clock

    async def do(self, run: Run, say: Say) -> str:
        """Do a run to its end; what is to be said of it.

        Raises:
            RunFailed: the run failed.
        """
        kind = run.job.kind
        if isinstance(kind, HttpRequest):
            return await self._request(kind, run)
        if isinstance(kind, Scale):
            return await self._scale(kind, say)
        return await self._batch(kind, run, say)

    async def _request(self, kind: HttpRequest, run: Run) -> str:
        headers = {name: _filled(value, run) for name, value in kind.headers.items()}
        body = None if kind.body is None else _filled(kind.body, run).encode()
        url = _filled(kind.url, run)
        try:
            async with self._endpoint.session.request(
                kind.method, url, data=body, headers=headers
            ) as response:
                said = (await response.content.read(MOST_SAID)).decode(errors="replace")
                status = response.status
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise RunFailed(f"{url}: {str(error) or type(error).__name__}") from error
        if status >= HTTPStatus.BAD_REQUEST:
            raise RunFailed(f"{url} answers {status}: {said}")
        return f"{status}: {said}"

    async def _scale(self, kind: Scale, say: Say) -> str:
        try:
            if not await self._endpoint.scale(kind.instances):
                raise RunFailed(f"{self._endpoint.url} cannot scale: it serves no admin API")
        except Away as error:
            raise RunFailed(str(error)) from error
        await say(f"{kind.instances} instances have been asked for")
        while True:
            try:
                described = await self._endpoint.describe()
            except Away:
                described = None
            berths = [] if described is None else described.get("berths", [])
            states = [berth.get("state") for berth in berths]
            if described is not None and len(states) == kind.instances == states.count("running"):
                return f"{kind.instances} instances run"
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _batch(self, kind: SubmitBatch, run: Run, say: Say) -> str:
        batch_id = f"batch_{run.run_id}-{run.num_failures}"
        try:
            batch = await self._made(kind, run, batch_id, say)
            while batch["status"] in OPEN:
                await asyncio.sleep(POLL_INTERVAL_S)
                batch = await asyncio.to_thread(
                    store.get, self._database, OWNER, batch_id, self._clock()
                )
            if kind.output is not None and batch["output_file_id"]:
                path = Path(_filled(kind.output, run))
                await asyncio.to_thread(self._write, batch["output_file_id"], path)
        except (OSError, LineError, files.NotFound, files.UploadError, store.BadRequest) as error:
            raise RunFailed(str(error)) from error
        counts = batch["request_counts"]
        said = (
            f"{batch_id} is {batch['status']}: of {counts['total']} lines {counts['completed']}"
            f" succeeded, {counts['failed']} failed"
        )
        if batch["status"] != Status.COMPLETED:
            raise RunFailed(said)
        return said

    async def _made(self, kind: SubmitBatch, run: Run, batch_id: str, say: Say) -> dict[str, Any]:
        try:
            return await asyncio.to_thread(
                store.get, self._database, OWNER, batch_id, self._clock()
            )
        except files.NotFound:
            path = Path(_filled(kind.file, run))
        file_id = await asyncio.to_thread(self._upload, path)
        batch = await asyncio.to_thread(
            store.create,
            self._database,
            OWNER,
            input_file_id=file_id,
            endpoint=kind.endpoint,
            completion_window=kind.completion_window,
            metadata=kind.metadata,
            now=self._clock(),
            batch_id=batch_id,
        )
        self._created()
        await say(f"{batch_id} has been made of {path}")
        return batch

    def _upload(self, path: Path) -> str:
        with path.open("rb") as lines:
            upload = files.Upload(
                self._database, OWNER, path.name, self._clock(), DEFAULT_MOST_LINES
            )
            try:
                for part in _parts(enumerate(lines, start=1)):
                    upload.add(part)
                return str(upload.finish()["id"])
            except BaseException:
                upload.abandon()
                raise

    def _write(self, file_id: str, path: Path) -> None:
        row = files.get(self._database, OWNER, file_id)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        with part.open("wb") as written:
            for page in files.content(self._database, row):
                written.write(page)
        part.replace(path)


def _parts(lines: Iterator[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    part: list[tuple[int, bytes]] = []
    for number, line in lines:
        if line.strip():
            part.append((number, line.rstrip(b"\n")))
        if len(part) >= PART_LINES:
            yield part
            part = []
    if part:
        yield part


def _filled(text: str, run: Run) -> str:
    # Not `format`, to which the braces of a JSON body mean something.
    due = datetime.fromtimestamp(run.due_at, UTC).isoformat()
    return text.replace("{shard}", run.shard).replace("{due}", due)
