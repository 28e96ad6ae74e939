"""Cost of llumsched over plain vLLM: one instance of each, side by side, in alternation.

Both servers run at once with the same model and flags; only one is loaded at a time, and they
take turns, so a machine that slows down slows both. Each round sends the same greedy requests
(prompts of about 32 tokens, 64 output tokens, EOS ignored) at a fixed concurrency and records
every token's arrival at the client. Prompts are short, so that the time to the first token is
not drowned in that of the prompt. Ratios are taken within a round, llumsched over vLLM, and their
median over the rounds is reported; at concurrency 1 a round is one request to each.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from benchmarks._report import Figure, Report, Table, main
from benchmarks._servers import Server, llumsched, plain_vllm

BENCHMARK = "Overhead of the frontend"

# Concurrency -> rounds. The lower it is, the fewer figures a round gives.
NUM_ROUNDS = {1: 15, 8: 9, 32: 5}
NUM_QUICK_ROUNDS = 2
NUM_OUTPUT_TOKENS = 64
WORDS = "the scheduler moves a running request to another instance while it keeps decoding "


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One server's answers to one round of requests."""

    throughput: float
    """Output tokens a second."""
    ttfts_s: Sequence[float]
    itls_s: Sequence[float]


def run(quick: bool) -> Report:
    num_rounds = dict.fromkeys(NUM_ROUNDS, NUM_QUICK_ROUNDS) if quick else NUM_ROUNDS
    with plain_vllm() as vllm, llumsched(instances=1) as ours:
        rounds = asyncio.run(_alternate({"vllm": vllm, "llumsched": ours}, num_rounds))
    figures = []
    rows = []
    for concurrency in NUM_ROUNDS:
        plain = rounds["vllm", concurrency]
        routed = rounds["llumsched", concurrency]
        pairs = list(zip(routed, plain, strict=True))
        throughput = statistics.median(a.throughput / b.throughput for a, b in pairs)
        itl = statistics.median(
            statistics.median(a.itls_s) / statistics.median(b.itls_s) for a, b in pairs
        )
        added_ms = 1000 * statistics.median(
            statistics.median(a.ttfts_s) - statistics.median(b.ttfts_s) for a, b in pairs
        )
        at = f"at concurrency {concurrency}"
        figures += [
            Figure(
                name=f"output-token throughput, ratio {at}",
                value=throughput,
                unit="",
                at_least=0.97,
            ),
            Figure(name=f"median ITL, ratio {at}", value=itl, unit="", at_most=1.03),
            Figure(name=f"median added TTFT {at}", value=added_ms, unit="ms", at_most=3),
        ]
        for name, done in (("plain vLLM", plain), ("llumsched", routed)):
            rows.append(
                (
                    str(concurrency),
                    str(num_rounds[concurrency]),
                    name,
                    statistics.median(r.throughput for r in done),
                    1000 * statistics.median(t for r in done for t in r.itls_s),
                    1000 * statistics.median(t for r in done for t in r.ttfts_s),
                )
            )
    return Report(
        figures=figures,
        tables=[
            Table(
                title="Medians over the rounds",
                columns=("concurrency", "rounds", "server", "tokens/s", "ITL, ms", "TTFT, ms"),
                rows=rows,
            )
        ],
    )


async def _alternate(
    servers: dict[str, Server], num_rounds: dict[int, int]
) -> dict[tuple[str, int], list[Round]]:
    rounds: dict[tuple[str, int], list[Round]] = {
        (name, concurrency): [] for name in servers for concurrency in num_rounds
    }
    timeout = aiohttp.ClientTimeout(total=300)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        for server in servers.values():  # warm-up, not measured
            await _round(session, server, 8, salt="warm-up")
        for concurrency, num in num_rounds.items():
            for index in range(num):
                # Turn about, so that neither server always comes first.
                names = list(servers) if index % 2 == 0 else list(reversed(servers))
                for name in names:
                    done = await _round(session, servers[name], concurrency, salt=f"{index}")
                    rounds[name, concurrency].append(done)
            print(f"{num} rounds at concurrency {concurrency} done", file=sys.stderr, flush=True)
    return rounds


async def _round(
    session: aiohttp.ClientSession, server: Server, concurrency: int, *, salt: str
) -> Round:
    started_s = time.perf_counter()

    async def request(number: int) -> list[float]:
        # The number comes first: no request finds another's prefix in the cache.
        prompt = f"{salt} {concurrency} {number} " + WORDS * 2
        return await _stream(session, server, prompt)

    streams = await asyncio.gather(*(request(number) for number in range(concurrency)))
    elapsed_s = time.perf_counter() - started_s
    return Round(
        throughput=concurrency * NUM_OUTPUT_TOKENS / elapsed_s,
        ttfts_s=[times[1] - times[0] for times in streams],
        itls_s=[b - a for times in streams for a, b in itertools.pairwise(times[1:])],
    )


async def _stream(session: aiohttp.ClientSession, server: Server, prompt: str) -> list[float]:
    """Times of the start and of every token, in seconds."""
    body = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": NUM_OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    times = [time.perf_counter()]
    async with session.post(f"{server.url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {") and json.loads(line[6:])["choices"]:
                times.append(time.perf_counter())
    if len(times) < NUM_OUTPUT_TOKENS // 2:
        raise RuntimeError(f"{server.url}: {len(times) - 1} chunks for {NUM_OUTPUT_TOKENS} tokens")
    return times


if __name__ == "__main__":
    sys.exit(main(run))
