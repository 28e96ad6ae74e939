"""Sends a trace to a real server as it stands, and notes when each answer's tokens came."""

from __future__ import annotations

import asyncio
import time

import numpy as np

from benchmarks._servers import Server
from benchmarks._streams import Stream, clients, prompt_of, read
from llumsched.simulator.results.metrics import Latencies
from llumsched.simulator.traces.trace import Trace


def replay(server: Server, trace: Trace, *, salt: int) -> Latencies:
    """Latencies of every request, in the rows of the trace; NaN where a figure has no meaning.

    Prompts are tokens in an order that no other prompt of this server has, so no prefix is found.

    Raises:
        RuntimeError: an answer has not as many tokens as the trace says.
    """
    return asyncio.run(_replay(server, trace, salt))


async def _replay(server: Server, trace: Trace, salt: int) -> Latencies:
    async with clients() as session:
        began_s = time.perf_counter()

        async def ask(row: int) -> Stream:
            await asyncio.sleep(began_s + float(trace.arrival_s[row]) - time.perf_counter())
            prompt = prompt_of(salt * 100_003 + row, int(trace.num_prompt_tokens[row]))
            stream, num_tokens = Stream(), int(trace.num_output_tokens[row])
            await read(session, server, prompt, stream, num_tokens)
            if len(stream.times_s) != num_tokens:
                raise RuntimeError(f"{len(stream.times_s)} tokens came, not {num_tokens}")
            return stream

        answers = await asyncio.gather(*(ask(row) for row in range(len(trace))))
    sent = np.array([answer.asked_s for answer in answers])
    first = np.array([answer.times_s[0] for answer in answers])
    last = np.array([answer.times_s[-1] for answer in answers])
    gaps = trace.num_output_tokens - 1
    tpot = np.divide(last - first, gaps, out=np.full(len(trace), np.nan), where=gaps > 0)
    nan = np.full(len(trace), np.nan)
    return Latencies(
        ttft_s=first - sent, tpot_s=tpot, e2e_s=last - sent, queueing_s=nan, itl_max_s=nan
    )
