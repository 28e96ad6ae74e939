"""Bodies of requests to the HTTP of our own processes: an object, or the client's mistake."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web


async def json_object(request: web.Request) -> dict[str, Any]:
    """The object that a body is, whatever its headers say of it.

    Raises:
        HTTPBadRequest: the body is no JSON object, is nested too deeply, or has half a surrogate
            pair, which no text can carry on.
    """
    try:
        body = json.loads(await request.read())
        json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text="The body must be a JSON object.")
    return body
