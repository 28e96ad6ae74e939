"""Sends a trace to a real server as it stands, and notes when each answer's tokens came."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import aiohttp
import numpy as np

from benchmarks._servers import Server
from llumsched.simulator.results.metrics import Latencies
from llumsched.simulator.traces.trace import Trace

TIMEOUT_S = 600.0
_FIRST_TOKEN, _NUM_TOKENS = 1000, 40_000


def replay(server: Server, trace: Trace, *, salt: int) -> Latencies:
    """Latencies of every request, in the rows of the trace; NaN where a figure has no meaning.

    Prompts are tokens in an order that no other prompt of this server has, so no prefix is found.

    Raises:
        RuntimeError: an answer has not as many tokens as the trace says.
    """
    return asyncio.run(_replay(server, trace, salt))


async def _replay(server: Server, trace: Trace, salt: int) -> Latencies:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        began_s = time.perf_counter()

        async def ask(row: int) -> tuple[float, list[float]]:
            await asyncio.sleep(began_s + float(trace.arrival_s[row]) - time.perf_counter())
            sent_s = time.perf_counter()
            prompt = _prompt(salt * 100_003 + row, int(trace.num_prompt_tokens[row]))
            times = await _answer(session, server, prompt, int(trace.num_output_tokens[row]))
            return sent_s, times

        answers = await asyncio.gather(*(ask(row) for row in range(len(trace))))
    sent = np.array([sent_s for sent_s, _ in answers])
    first = np.array([times[0] for _, times in answers])
    last = np.array([times[-1] for _, times in answers])
    gaps = trace.num_output_tokens - 1
    tpot = np.divide(last - first, gaps, out=np.full(len(trace), np.nan), where=gaps > 0)
    nan = np.full(len(trace), np.nan)
    return Latencies(
        ttft_s=first - sent, tpot_s=tpot, e2e_s=last - sent, queueing_s=nan, itl_max_s=nan
    )


def _prompt(number: int, num_tokens: int) -> list[int]:
    return [_FIRST_TOKEN + (number * 7919 + i * 31) % _NUM_TOKENS for i in range(num_tokens)]


async def _answer(
    session: aiohttp.ClientSession, server: Server, prompt: list[int], num_tokens: int
) -> list[float]:
    """When each token came."""
    body: dict[str, Any] = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    times: list[float] = []
    async with session.post(f"{server.url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                new = sum(len(choice.get("token_ids") or ()) for choice in chunk["choices"])
                # Several tokens in one chunk came at once, as far as the client can tell.
                times += [time.perf_counter()] * new
    if len(times) != num_tokens:
        raise RuntimeError(f"{len(times)} tokens came, not {num_tokens}")
    return times
