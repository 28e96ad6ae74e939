"""Streamed answers as a client sees them: each token, and when it came."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import aiohttp

from benchmarks._servers import Server

TIMEOUT_S = 600.0


class AnswerBroken(Exception):
    """The server ended an answer with an error."""


@dataclass(slots=True)
class Stream:
    """An answer as it comes. ``times_s`` has the moment of each token, as ``asked_s`` that of the
    question; the tokens came in ``num_chunks`` parts."""

    request_id: str = ""
    num_chunks: int = 0
    asked_s: float = 0.0
    times_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    _grew: asyncio.Event = field(default_factory=asyncio.Event)

    def take_in(self, token_ids: list[int]) -> None:
        """Tokens that came just now: at once, as far as the client can tell."""
        self.num_chunks += bool(token_ids)
        self.times_s += [time.perf_counter()] * len(token_ids)
        self.token_ids += token_ids
        self._grew.set()

    async def reach(self, num_tokens: int) -> None:
        """Wait until so many tokens have come. Whoever asks again and again takes the time from
        those who compute them."""
        while len(self.times_s) < num_tokens:
            self._grew.clear()
            await self._grew.wait()

    def gaps_s(self) -> list[tuple[float, float]]:
        """Each gap between two tokens, with the moment of its end."""
        return [(b, b - a) for a, b in itertools.pairwise(self.times_s)]


@asynccontextmanager
async def clients() -> AsyncIterator[aiohttp.ClientSession]:
    """As many connections as there are questions."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        yield session


async def read(
    session: aiohttp.ClientSession,
    server: Server,
    prompt: list[int],
    stream: Stream,
    num_tokens: int,
    *,
    until: int | None = None,
    salt: str | None = None,
    priority: int = 0,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Ask for a greedy answer of exactly ``num_tokens`` tokens, into ``stream``.

    Args:
        until: leave after so many tokens.
        salt: keeps the prompt from being found in a cache.
        priority: vLLM's, of which the lowest is served first.

    Raises:
        AnswerBroken: when the server gives up; else what ``aiohttp`` raises.
    """
    body: dict[str, Any] = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    if salt is not None:
        body["cache_salt"] = salt
    if priority:
        body["priority"] = priority
    stream.asked_s = time.perf_counter()
    async with session.post(f"{server.url}/v1/completions", json=body, headers=headers) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise AnswerBroken(chunk["error"]["message"])
            stream.request_id = chunk["id"]
            new = [t for choice in chunk["choices"] for t in choice.get("token_ids") or ()]
            stream.take_in(new)
            if until is not None and len(stream.token_ids) >= until:
                return


def prompt_of(number: int, num_tokens: int) -> list[int]:
    """Tokens that no prompt of another number has in this order, from the first block on."""
    return [1000 + (number * 7919 + i * 31) % 40000 for i in range(num_tokens)]
