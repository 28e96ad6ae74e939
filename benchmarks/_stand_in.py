"""A server that answers like vLLM's, at once and for next to no processor time.

Each answer is a stream of events, the first one at once; ``max_tokens`` says how many. A request
with ``hold`` gets its first event, and the next when its client leaves. Run as a program with
``--host`` and ``--port``.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

from llumsched.flags import Parser

MODEL = "stand-in"
EVENTS_AT_ONCE = 4


def make_app() -> web.Application:
    """The server's paths: completions, and what routers ask before they send any."""
    app = web.Application()
    app.router.add_get("/health", _ok)
    app.router.add_get("/metrics", _metrics)
    app.router.add_get("/v1/models", _models)
    app.router.add_post("/v1/completions", _complete)
    app.router.add_get("/{path:.*}", _ok)
    return app


async def _ok(_: web.Request) -> web.Response:
    return web.json_response({})


async def _metrics(_: web.Request) -> web.Response:
    return web.Response(
        text='vllm:num_requests_running{model_name="stand-in"} 0\n'
        'vllm:num_requests_waiting{model_name="stand-in"} 0\n'
    )


async def _models(_: web.Request) -> web.Response:
    model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "", "max_model_len": 4096}
    return web.json_response({"object": "list", "data": [model]})


async def _complete(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    await answer.write(_event(0))
    if body.get("user") == "hold":
        await asyncio.Event().wait()
    num_tokens = int(body["max_tokens"])
    for first in range(1, num_tokens, EVENTS_AT_ONCE):
        last = min(num_tokens, first + EVENTS_AT_ONCE)
        await answer.write(b"".join(map(_event, range(first, last))))
        await asyncio.sleep(0)
    await answer.write(b"data: [DONE]\n\n")
    await answer.write_eof()
    return answer


def _event(number: int) -> bytes:
    choice: dict[str, Any] = {"index": 0, "text": f" word{number}", "finish_reason": None}
    event = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": MODEL}
    return b"data: " + json.dumps({**event, "choices": [choice]}).encode() + b"\n\n"


if __name__ == "__main__":
    parser = Parser(prog="stand-in", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    web.run_app(make_app(), host=arguments.host, port=arguments.port, print=None, access_log=None)
