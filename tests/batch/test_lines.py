"""Lines of input files: what is refused, and that chunks may end anywhere."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumsched.batch.lines import LineError, answered, parse_line, split_lines
from tests.batch.servers import input_line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "GET"}, "method"),
        ({"url": "/v1/nothing"}, "url"),
        ({"custom_id": ""}, "custom_id"),
        ({"custom_id": "x" * 513}, "custom_id"),
        ({"custom_id": "a\0"}, "zero"),
        ({"custom_id": 3}, "custom_id"),
        ({"body": []}, "body"),
        ({"body": {}}, "model"),
        ({"body": {"model": "m", "stream": True}}, "stream"),
    ],
)
def test_a_line_that_cannot_be_sent_says_why(changes: dict[str, object], said: str) -> None:
    line = {**json.loads(input_line(0)), **changes}
    with pytest.raises(LineError, match=said):
        parse_line(json.dumps(line).encode())


@pytest.mark.parametrize("line", [b"{", b"[]", b"\xff", b"3", b'{"custom_id": "a"}'])
def test_what_is_no_request_is_refused(line: bytes) -> None:
    with pytest.raises(LineError):
        parse_line(line)


@given(st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r\n", b" "]), max_size=20))
def test_lines_are_the_same_however_they_come_in_chunks(chunks: list[bytes]) -> None:
    whole = b"".join(chunks).split(b"\n")
    expected = [(n, line) for n, line in enumerate(whole, start=1) if line.strip()]
    assert asyncio.run(_split(chunks)) == expected


def test_a_line_without_an_end_is_not_gathered() -> None:
    with pytest.raises(LineError, match="line 2 has more than 5 bytes"):
        asyncio.run(_split([b"abc\n", b"defg", b"hi", b"never asked for"], most_bytes=5))


async def _split(chunks: list[bytes], most_bytes: int = 100) -> list[tuple[int, bytes]]:
    async def come() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    return [found async for found in split_lines(come(), most_bytes)]


def test_an_answer_that_is_no_json_is_kept_as_text() -> None:
    found = json.loads(answered("a", 502, "r", b"<html>\xff"))
    assert found["response"]["body"]["error"]["message"].startswith("<html>")
