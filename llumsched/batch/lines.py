"""Lines of an input file and of an output file: what a line may say, and how it is written.

Nothing here knows a database or a network.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any, Literal

import msgspec

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MOST_LINE_BYTES = 8 * 2**20
MOST_ID_LENGTH = 512
EXPIRED = "batch_expired"
EXPIRED_MESSAGE = "This request could not be executed before the completion window expired."


class LineError(ValueError):
    """A line that cannot be sent; the message says why."""


class InputLine(msgspec.Struct, frozen=True, kw_only=True):
    """A request as a line of an input file has it."""

    custom_id: str
    method: Literal["POST"]
    url: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    body: dict[str, Any]


_decoder = msgspec.json.Decoder(InputLine)


def parse_line(line: bytes) -> InputLine:
    """The request of a line.

    Raises:
        LineError: the line is not one.
    """
    try:
        parsed = _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LineError(str(error)) from None
    if not 0 < len(parsed.custom_id) <= MOST_ID_LENGTH:
        raise LineError(f"'custom_id' must have 1 to {MOST_ID_LENGTH} characters")
    if "\0" in parsed.custom_id:
        raise LineError("'custom_id' must not have a zero character")
    if parsed.body.get("stream"):
        raise LineError("'stream' cannot be true in a batch")
    if not isinstance(parsed.body.get("model"), str):
        raise LineError("'body' must name a 'model'")
    return parsed


async def split_lines(
    chunks: AsyncIterable[bytes], most_bytes: int = MOST_LINE_BYTES
) -> AsyncIterator[tuple[int, bytes]]:
    """Number and bytes of each line that is not empty, without its end; the first is number 1.

    Never more than a chunk and a line are held.

    Raises:
        LineError: a line is longer than `most_bytes`.
    """
    rest = bytearray()
    number = 0
    async for chunk in chunks:
        rest += chunk
        *lines, last = rest.split(b"\n")
        for line in lines:
            number += 1
            if len(line) > most_bytes:
                raise LineError(f"line {number} has more than {most_bytes:,} bytes")
            if line.strip():
                yield number, bytes(line)
        rest = bytearray(last)
        if len(rest) > most_bytes:
            raise LineError(f"line {number + 1} has more than {most_bytes:,} bytes")
    if rest.strip():
        yield number + 1, bytes(rest)


def answered(custom_id: str, status: int, request_id: str, content: bytes) -> str:
    """The line of an output or error file about a request that was answered."""
    try:
        body = json.loads(content)
    except ValueError:
        body = {"error": {"message": content.decode(errors="replace")[:2000]}}
    response = {"status_code": status, "request_id": request_id, "body": body}
    return _line(custom_id, response, None)


def unanswered(custom_id: str, code: str, message: str) -> str:
    """The line of an error file about a request that has no answer."""
    return _line(custom_id, None, {"code": code, "message": message})


def _line(custom_id: str, response: dict[str, Any] | None, error: dict[str, str] | None) -> str:
    return json.dumps(
        {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": custom_id,
            "response": response,
            "error": error,
        },
        separators=(",", ":"),
    )
