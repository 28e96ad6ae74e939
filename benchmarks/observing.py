"""Cost of looking: a pool that is observed beside one that is not, side by side, in alternation.

The observed one counts its metrics and is scraped for them every five seconds, exports the spans of
a tenth of its requests to a collector of this process, and has the live page open in two viewers.
The other has vLLM's statistics, the admin API and tracing off. Both run at once with one instance,
the same model and flags; only one is loaded at a time, and they take turns, so a machine that slows
down slows both. A round is a number of greedy answers of 64 tokens at once. Ratios are taken within
a round, and their medians over the rounds are reported: that of the throughputs, and that of the
processor time a token of all processes of the server but Ray's own, which a busy machine hardly
changes. The viewers and the collector take their share of the machine in the rounds of both.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

import aiohttp

from benchmarks._report import Figure, Report, Table, main
from benchmarks._servers import ENGINE_FLAGS, Server, llumsched, processor_time_s
from benchmarks._streams import Stream, clients, read
from tests.e2e.collector import Collector

BENCHMARK = "Cost of metrics, tracing and the live page"

CONCURRENCY = 16
NUM_ROUNDS = 9
NUM_QUICK_ROUNDS = 3
NUM_OUTPUT_TOKENS = 64
NUM_TOKENS = CONCURRENCY * NUM_OUTPUT_TOKENS
NUM_PROMPT_TOKENS = 32
NUM_VIEWERS = 2
SCRAPE_INTERVAL_S = 5.0
SAMPLED_SHARE = 0.1
GOAL = 0.99
OFF = ("--disable-log-stats", "--admin-api", "off")
SAMPLER = {
    "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
    "OTEL_TRACES_SAMPLER_ARG": str(SAMPLED_SHARE),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One server's answers to one round of requests."""

    throughput: float
    """Output tokens a second."""
    cpu_s: float
    """Processor time an output token."""


def run(quick: bool) -> Report:
    num_rounds = NUM_QUICK_ROUNDS if quick else NUM_ROUNDS
    os.environ.update(SAMPLER)
    with Collector() as collector:
        on = ("--otlp-traces-endpoint", collector.endpoint)
        with (
            llumsched(instances=1, flags=(*ENGINE_FLAGS, *OFF)) as plain,
            llumsched(instances=1, flags=(*ENGINE_FLAGS, *on)) as observed,
        ):
            servers = {"off": plain, "on": observed}
            rounds, seen = asyncio.run(_alternate(servers, num_rounds))
        num_roots = sum(span.name == "llumsched.request" for span in collector.spans)
    pairs = list(zip(rounds["on"], rounds["off"], strict=True))
    num_requests = CONCURRENCY * (num_rounds + 1)
    return Report(
        figures=[
            Figure(
                name=f"output-token throughput at concurrency {CONCURRENCY}, observed over not",
                value=statistics.median(on.throughput / off.throughput for on, off in pairs),
                unit="",
                at_least=GOAL,
            ),
            Figure(
                name="processor time a token, not observed over observed",
                value=statistics.median(off.cpu_s / on.cpu_s for on, off in pairs),
                unit="",
                at_least=GOAL,
            ),
            Figure(
                name="share of the requests whose spans came",
                value=num_roots / num_requests,
                unit="",
            ),
        ],
        tables=[
            Table(
                title="Rounds",
                columns=(
                    "",
                    "rounds",
                    "tokens/s, median",
                    "least",
                    "most",
                    "ms of processor a token",
                ),
                rows=[_row(name, done) for name, done in rounds.items()],
            ),
            Table(
                title="Meanwhile",
                columns=("what", "how often"),
                rows=[(what, str(count)) for what, count in seen.items()],
            ),
        ],
    )


def _row(name: str, rounds: Sequence[Round]) -> tuple[str | float, ...]:
    speeds = [done.throughput for done in rounds]
    cpu_ms = 1000 * statistics.median(done.cpu_s for done in rounds)
    return name, str(len(rounds)), statistics.median(speeds), min(speeds), max(speeds), cpu_ms


async def _alternate(
    servers: Mapping[str, Server], num_rounds: int
) -> tuple[dict[str, list[Round]], dict[str, int]]:
    rounds: dict[str, list[Round]] = {name: [] for name in servers}
    async with clients() as session:
        for server in servers.values():  # warm-up, not measured
            await _round(session, server, "warm-up")
        async with _looking(session, servers["on"]) as seen:
            for index in range(num_rounds):
                # Turn about, so that neither server always comes first.
                names = list(servers)
                for name in names if index % 2 == 0 else reversed(names):
                    rounds[name].append(await _round(session, servers[name], str(index)))
    return rounds, seen


@contextlib.asynccontextmanager
async def _looking(session: aiohttp.ClientSession, server: Server) -> AsyncIterator[dict[str, int]]:
    """Viewers of the live page and a scraper, for as long as this lasts; how much they got."""
    seen = {"frames of the live page": 0, "scrapes": 0}

    async def view() -> None:
        async with session.get(f"{server.url}/llumsched/live") as response:
            response.raise_for_status()
            async for line in response.content:
                seen["frames of the live page"] += line.startswith(b"data: ")

    async def scrape() -> None:
        while True:
            async with session.get(f"{server.url}/metrics") as response:
                response.raise_for_status()
                await response.read()
            seen["scrapes"] += 1
            await asyncio.sleep(SCRAPE_INTERVAL_S)

    tasks = [asyncio.create_task(view()) for _ in range(NUM_VIEWERS)]
    tasks.append(asyncio.create_task(scrape()))
    try:
        yield seen
    finally:
        for task in tasks:
            if task.done():
                task.result()  # it failed: nobody has looked
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _round(session: aiohttp.ClientSession, server: Server, salt: str) -> Round:
    cpu_s, started_s = processor_time_s(server), time.perf_counter()
    streams = [Stream() for _ in range(CONCURRENCY)]
    await asyncio.gather(
        *(
            # The number comes first: no request finds another's prefix in the cache.
            read(
                session,
                server,
                [500 + number, *range(600, 600 + NUM_PROMPT_TOKENS - 1)],
                stream,
                NUM_OUTPUT_TOKENS,
                salt=salt,
            )
            for number, stream in enumerate(streams)
        )
    )
    took_s = time.perf_counter() - started_s
    return Round(
        throughput=NUM_TOKENS / took_s, cpu_s=(processor_time_s(server) - cpu_s) / NUM_TOKENS
    )


if __name__ == "__main__":
    sys.exit(main(run))
