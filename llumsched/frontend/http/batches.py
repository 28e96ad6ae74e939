"""``/v1/files`` and ``/v1/batches`` at a frontend, passed on to ``llumsched batch``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from llumsched.batch.pass_on import PATHS, BatchServer, BatchServerAway, passed_on

METHODS = ["GET", "POST", "DELETE"]


def batch_router(server: BatchServer) -> APIRouter:
    """The routes to the batch process. Who made `server` closes it."""
    router = APIRouter(tags=["batches"])

    async def pass_on(request: Request) -> Response:
        path = request.url.path
        if request.url.query:
            path += f"?{request.url.query}"
        body = request.stream() if request.method == "POST" else None
        stack = AsyncExitStack()
        try:
            answer = await stack.enter_async_context(
                server.ask(request.method, path, dict(request.headers), body)
            )
        except BatchServerAway as error:
            said = {"message": str(error), "type": "BadGatewayError", "code": int(error.status)}
            return JSONResponse({"error": {**said, "param": None}}, error.status)

        async def content() -> AsyncIterator[bytes]:
            async with stack:
                async for chunk in answer.content.iter_any():
                    yield chunk

        return StreamingResponse(content(), answer.status, passed_on(answer.headers))

    for path in PATHS:
        for pattern in (path, f"{path}/{{rest:path}}"):
            router.add_api_route(pattern, pass_on, methods=METHODS, include_in_schema=False)
    return router
