"""HTTP of the batch process: OpenAI's `/v1/files` and `/v1/batches`.

Invariant: an upload is never held whole; lines are checked and kept in parts as they come. With
keys, a client sees the files and batches of its own key alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any, TypeVar

from aiohttp import BodyPartReader, web

from llumsched.batch import files, store
from llumsched.batch.bodies import json_object
from llumsched.batch.database import Database
from llumsched.batch.lines import LineError, split_lines
from llumsched.batch.metrics import BatchMetrics

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

CHUNK_BYTES = 2**16
PART_LINES = 500
MOST_FIELD_BYTES = 4096
DEFAULT_MOST_LINES = 1_000_000
MOST_BODY_BYTES = 2**20
OPEN_PATHS = ("/health", "/metrics")
OWNER = web.RequestKey("owner", str)


def add_routes(
    app: web.Application,
    database: Database,
    metrics: BatchMetrics,
    created: Callable[[], None],
    most_lines: int = DEFAULT_MOST_LINES,
    clock: Callable[[], float] = time.time,
) -> None:
    """Add the paths of files and batches, and of metrics.

    Args:
        created: called when there is a new batch.
        most_lines: of one file.
        clock: seconds since the epoch.
    """
    api = _Api(database, metrics, created, most_lines, clock)
    app.router.add_get("/metrics", api.exposition)
    app.router.add_post("/v1/files", api.upload)
    app.router.add_get("/v1/files", api.list_files)
    app.router.add_get("/v1/files/{file_id}", api.file)
    app.router.add_delete("/v1/files/{file_id}", api.delete_file)
    app.router.add_get("/v1/files/{file_id}/content", api.content)
    app.router.add_post("/v1/batches", api.create_batch)
    app.router.add_get("/v1/batches", api.list_batches)
    app.router.add_get("/v1/batches/{batch_id}", api.batch)
    app.router.add_post("/v1/batches/{batch_id}/cancel", api.cancel_batch)


def middleware(client_keys: Sequence[str], admin_keys: Sequence[str]) -> Any:
    """Errors in OpenAI's shape, and keys: those of clients for `/v1`, of operators for the rest."""

    @web.middleware
    async def handle(request: web.Request, handler: Handler) -> web.StreamResponse:
        is_admin = request.path.startswith("/llumsched")
        keys = admin_keys if is_admin else client_keys
        header = request.headers.get("Authorization", "").removeprefix("Bearer ")
        given = header.encode("utf-8", "surrogateescape")
        if keys and request.path not in OPEN_PATHS and not _is_one_of(given, keys):
            return error_response(HTTPStatus.UNAUTHORIZED, "Give one of the server's API keys.")
        # The digest stays the same over restarts and tells nobody the key.
        request[OWNER] = hashlib.sha256(given).hexdigest()[:16] if keys else ""
        try:
            return await handler(request)
        except files.NotFound as error:
            return error_response(HTTPStatus.NOT_FOUND, str(error))
        except files.Conflict as error:
            return error_response(HTTPStatus.CONFLICT, str(error))
        except (store.BadRequest, files.UploadError, LineError) as error:
            return error_response(HTTPStatus.BAD_REQUEST, str(error))
        except web.HTTPException as error:
            if error.status < HTTPStatus.BAD_REQUEST:
                raise
            return error_response(HTTPStatus(error.status), error.text or error.reason)

    return handle


def _is_one_of(given: bytes, keys: Sequence[str]) -> bool:
    return any(hmac.compare_digest(given, key.encode()) for key in keys)


def error_response(status: HTTPStatus, message: str) -> web.Response:
    """An error as OpenAI's API has it."""
    kind = {
        HTTPStatus.UNAUTHORIZED: "authentication_error",
        HTTPStatus.NOT_FOUND: "not_found_error",
    }.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": None, "code": int(status)}
    return web.json_response({"error": error}, status=status)


class _Api:
    def __init__(
        self,
        database: Database,
        metrics: BatchMetrics,
        created: Callable[[], None],
        most_lines: int,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._metrics = metrics
        self._created = created
        self._most_lines = most_lines
        self._clock = clock

    async def _call(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        return await asyncio.to_thread(function, self._database, *arguments, **options)

    async def exposition(self, request: web.Request) -> web.Response:
        page = await asyncio.to_thread(self._metrics.page)
        return web.Response(body=page, content_type="text/plain", charset="utf-8")

    # ---- files -------------------------------------------------------------------------------

    async def upload(self, request: web.Request) -> web.Response:
        if not request.content_type.startswith("multipart/"):
            raise web.HTTPBadRequest(text="Send the fields 'purpose' and 'file' as a form.")
        reader = await request.multipart()
        found: dict[str, Any] | None = None
        upload: files.Upload | None = None
        purpose = None
        try:
            async for part in reader:
                if not isinstance(part, BodyPartReader):
                    raise web.HTTPBadRequest(text="A form within a form is not read.")
                if part.name == "file":
                    if upload is not None:
                        raise web.HTTPBadRequest(text="Send one file at a time.")
                    begun: files.Upload = await self._call(
                        files.Upload,
                        request[OWNER],
                        part.filename or "batch.jsonl",
                        self._clock(),
                        self._most_lines,
                    )
                    upload = begun
                    await self._take(part, begun)
                elif part.name == "purpose":
                    purpose = await _field(part)
                    _check_purpose(purpose)
                else:
                    raise web.HTTPBadRequest(text=f"The field '{part.name}' is not supported.")
            if upload is None or purpose is None:
                raise web.HTTPBadRequest(text="The form needs the fields 'purpose' and 'file'.")
            found = await asyncio.to_thread(upload.finish)
        except (files.UploadError, LineError):
            raise
        except ValueError as error:
            # Of aiohttp's reader of forms.
            raise web.HTTPBadRequest(text=f"The form cannot be read: {error}.") from None
        finally:
            self._metrics.uploaded(is_accepted=found is not None)
            if upload is not None and found is None:
                await asyncio.to_thread(upload.abandon)
        return web.json_response(found)

    async def _take(self, part: BodyPartReader, upload: files.Upload) -> None:
        pending: list[tuple[int, bytes]] = []
        num_bytes = 0
        async for number, line in split_lines(_chunks(part)):
            pending.append((number, line))
            num_bytes += len(line)
            if len(pending) >= PART_LINES or num_bytes > MOST_BODY_BYTES:
                await asyncio.to_thread(upload.add, pending)
                pending, num_bytes = [], 0
        if pending:
            await asyncio.to_thread(upload.add, pending)

    async def list_files(self, request: web.Request) -> web.Response:
        order = request.query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise web.HTTPBadRequest(text="'order' must be asc or desc.")
        page, has_more = await self._call(
            files.list_page,
            request[OWNER],
            purpose=request.query.get("purpose"),
            after=request.query.get("after"),
            limit=_limit(request, 10_000),
            is_ascending=order == "asc",
        )
        return _listed(page, has_more)

    async def file(self, request: web.Request) -> web.Response:
        row = await self._call(files.get, request[OWNER], request.match_info["file_id"])
        return web.json_response(files.describe(row))

    async def delete_file(self, request: web.Request) -> web.Response:
        file_id = request.match_info["file_id"]
        await self._call(files.delete, request[OWNER], file_id)
        return web.json_response({"id": file_id, "object": "file", "deleted": True})

    async def content(self, request: web.Request) -> web.StreamResponse:
        row = await self._call(files.get, request[OWNER], request.match_info["file_id"])
        answer = web.StreamResponse(headers={"Content-Type": "application/jsonl"})
        pages = files.content(self._database, row)
        # A page first: what goes wrong then is still an error with a status.
        page = await asyncio.to_thread(next, pages, b"")
        await answer.prepare(request)
        while page:
            await answer.write(page)
            page = await asyncio.to_thread(next, pages, b"")
        await answer.write_eof()
        return answer

    # ---- batches -----------------------------------------------------------------------------

    async def create_batch(self, request: web.Request) -> web.Response:
        body = await json_object(request)
        known = {"input_file_id", "endpoint", "completion_window", "metadata"}
        for key in sorted(body.keys() - known):
            raise web.HTTPBadRequest(text=f"The field '{key}' is not supported.")
        for key in ("input_file_id", "endpoint", "completion_window"):
            if not isinstance(body.get(key), str):
                raise web.HTTPBadRequest(text=f"'{key}' must be a text.")
        _check_metadata(body.get("metadata"))
        batch = await self._call(store.create, request[OWNER], now=self._clock(), **body)
        self._created()
        return web.json_response(batch)

    async def list_batches(self, request: web.Request) -> web.Response:
        page, has_more = await self._call(
            store.list_page,
            request[OWNER],
            after_id=request.query.get("after"),
            limit=_limit(request, 100),
            now=self._clock(),
        )
        return _listed(page, has_more)

    async def batch(self, request: web.Request) -> web.Response:
        batch_id = request.match_info["batch_id"]
        return web.json_response(
            await self._call(store.get, request[OWNER], batch_id, self._clock())
        )

    async def cancel_batch(self, request: web.Request) -> web.Response:
        batch_id = request.match_info["batch_id"]
        return web.json_response(
            await self._call(store.cancel, request[OWNER], batch_id, self._clock())
        )


async def _chunks(part: BodyPartReader) -> AsyncIterator[bytes]:
    while chunk := await part.read_chunk(CHUNK_BYTES):
        yield chunk


async def _field(part: BodyPartReader) -> str:
    value = await part.read_chunk(MOST_FIELD_BYTES)
    if not part.at_eof() and await part.read_chunk(1):
        raise web.HTTPBadRequest(text=f"The field '{part.name}' is too long.")
    return bytes(value).decode(errors="replace")


def _check_purpose(purpose: str) -> None:
    if purpose != files.PURPOSE:
        raise web.HTTPBadRequest(text=f"'purpose' must be '{files.PURPOSE}', not {purpose!r}.")


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise web.HTTPBadRequest(text="'metadata' must be an object of texts.")
    if len(metadata) > 16 or any(len(k) > 64 or len(v) > 512 for k, v in metadata.items()):
        raise web.HTTPBadRequest(
            text="'metadata' may have 16 keys of 64 characters, with values of 512."
        )


def _limit(request: web.Request, most: int) -> int:
    text = request.query.get("limit", "20")
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= most:
        raise web.HTTPBadRequest(text=f"'limit' must be 1 to {most}.")
    return int(text)


def _listed(page: list[dict[str, Any]], has_more: bool) -> web.Response:
    return web.json_response(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": has_more,
        }
    )
