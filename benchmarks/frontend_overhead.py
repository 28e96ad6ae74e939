"""Overhead of llumsched over plain vLLM: on a request's way, in processor time, and when idle.

All servers run at once with the same model and flags: plain vLLM, and pools of two instances with
one frontend and with two. One at a time is loaded, and they take turns, so a machine that slows
down slows all.

The *way* of a request is the time to its first token less what the engine says that it has queued
and computed it (vLLM's own metrics): from the client to the engine and back. So a long step of the
engine is no part of it. *Processor time a token* is that of the frontends, or of vLLM's server,
with all their threads, while 32 greedy answers stream (prompts of 32 tokens, EOS ignored); its
ratio is taken within a round. *Idle* is a pool that serves nothing. Ray's own processes, and Ray's
and gloo's threads in ours, are counted apart; so is what vLLM's engine does by itself. Quick runs
leave the pool with two frontends out.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import sys
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from benchmarks import _cpu
from benchmarks._report import Figure, Report, Table, main
from benchmarks._servers import ENGINE_FLAGS, Server, llumsched, plain_vllm
from benchmarks._streams import Stream, clients, prompt_of, read

BENCHMARK = "Overhead of the frontend"

PLAIN = "plain vLLM"
ONE = "llumsched, 1 frontend"
TWO = "llumsched, 2 frontends"
NUM_STREAMS = 32
NUM_PROMPT_TOKENS = 32
METRICS_TIMEOUT_S = 10.0
METRICS_INTERVAL_S = 0.05
ENGINE_TIMES = ("vllm:request_queue_time_seconds", "vllm:request_prefill_time_seconds")
FLAGS = (*ENGINE_FLAGS[: ENGINE_FLAGS.index("--kv-cache-memory-bytes") + 1], str(1 << 28))


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured. Requests of ``num_ways`` go one after the other, so many a server."""

    num_ways: int
    num_rounds: int
    num_tokens: int
    idle_s: float


FULL = Size(num_ways=40, num_rounds=5, num_tokens=64, idle_s=60.0)
QUICK = Size(num_ways=5, num_rounds=1, num_tokens=16, idle_s=5.0)


def run(quick: bool) -> Report:
    size = QUICK if quick else FULL
    making = {PLAIN: plain_vllm(FLAGS), ONE: llumsched(2, FLAGS)}
    if not quick:
        making[TWO] = llumsched(2, (*FLAGS, "--frontends", "2"))
    with ExitStack() as stack, ThreadPoolExecutor(len(making)) as booting:
        servers = dict(zip(making, booting.map(stack.enter_context, making.values()), strict=True))
        measured = asyncio.run(_measure(servers, size))
    return _report(measured, size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """By server: the way of a request, in seconds, the processor time of its frontends for a token,
    a round each, and what each part has used of a core when idle."""

    ways_s: Mapping[str, Sequence[float]]
    token_s: Mapping[str, Sequence[float]]
    idle: Mapping[str, Counter[str]]


async def _measure(servers: Mapping[str, Server], size: Size) -> Measured:
    numbers = itertools.count()
    ways_s: dict[str, list[float]] = defaultdict(list)
    token_s: dict[str, list[float]] = defaultdict(list)
    for server in servers.values():  # warm-up, not measured
        await _stream(server, numbers, 8, 8)
    before = {name: _cpu.used_s(server.pid) for name, server in servers.items()}
    started_s = time.monotonic()
    await asyncio.sleep(size.idle_s)
    after = {name: _cpu.used_s(server.pid) for name, server in servers.items()}
    elapsed_s = time.monotonic() - started_s
    idle = {
        name: Counter({part: s / elapsed_s for part, s in (after[name] - before[name]).items()})
        for name in servers
    }
    for index in range(size.num_ways):
        for name in _turn(servers, index):
            ways_s[name].append(await _way(servers[name], numbers))
    for index in range(size.num_rounds):
        for name in _turn(servers, index):
            begun = _cpu.used_s(servers[name].pid)[_cpu.FRONTENDS]
            await _stream(servers[name], numbers, NUM_STREAMS, size.num_tokens)
            used_s = _cpu.used_s(servers[name].pid)[_cpu.FRONTENDS] - begun
            token_s[name].append(used_s / (NUM_STREAMS * size.num_tokens))
    return Measured(ways_s=ways_s, token_s=token_s, idle=idle)


def _turn(servers: Mapping[str, Server], index: int) -> list[str]:
    """Turn about, so that no server always comes first."""
    names = list(servers)
    return names if index % 2 == 0 else names[::-1]


async def _stream(
    server: Server, numbers: itertools.count[int], num_streams: int, num_tokens: int
) -> list[Stream]:
    streams = [Stream() for _ in range(num_streams)]
    async with clients() as session:
        await asyncio.gather(
            *(
                read(session, server, prompt_of(next(numbers), NUM_PROMPT_TOKENS), s, num_tokens)
                for s in streams
            )
        )
    return streams


async def _way(server: Server, numbers: itertools.count[int]) -> float:
    """Seconds from the client to the engine and back with the first token."""
    in_engine_s, num_requests = await asyncio.to_thread(_in_engine, server)
    (stream,) = await _stream(server, numbers, 1, 2)
    deadline_s = time.monotonic() + METRICS_TIMEOUT_S
    # The server counts a request when its last token has been sent.
    while (now := await asyncio.to_thread(_in_engine, server))[1] == num_requests:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{server.url}/metrics does not count a request that has ended")
        await asyncio.sleep(METRICS_INTERVAL_S)
    return stream.times_s[0] - stream.asked_s - (now[0] - in_engine_s)


def _in_engine(server: Server) -> tuple[float, float]:
    """Seconds that all requests so far have queued and computed before their first token, and
    their number; of all engines."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=METRICS_TIMEOUT_S) as answer:
        page = answer.read().decode()
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found[sample.name] += sample.value
    seconds = sum(found[f"{name}_sum"] for name in ENGINE_TIMES)
    return seconds, found[f"{ENGINE_TIMES[-1]}_count"]


def _report(measured: Measured, size: Size) -> Report:
    figures = []
    plain_way_s = statistics.median(measured.ways_s[PLAIN])
    for name in measured.ways_s:
        if name != PLAIN:
            added_s = statistics.median(measured.ways_s[name]) - plain_way_s
            figures.append(
                Figure(
                    name=f"{name}: added to the way of a request",
                    value=1000 * added_s,
                    unit="ms",
                    at_most=4,
                )
            )
    for name, per_token_s in measured.token_s.items():
        if name != PLAIN:
            pairs = zip(per_token_s, measured.token_s[PLAIN], strict=True)
            figures.append(
                Figure(
                    name=f"{name}: processor time a token, ratio to plain vLLM",
                    value=statistics.median(ours / plain for ours, plain in pairs),
                    unit="",
                    at_most=1.2,
                )
            )
    ours = sum(measured.idle[ONE][part] for part in _cpu.OURS)
    figures.append(
        Figure(
            name="idle pool of two, without Ray and gloo",
            value=100 * ours,
            unit="% of a core",
            at_most=2,
        )
    )
    rays = measured.idle[ONE][_cpu.RAY] + measured.idle[ONE][_cpu.RAY_WITHIN]
    figures.append(Figure(name="idle pool of two, Ray", value=100 * rays, unit="% of a core"))
    parts = [*_cpu.OURS, _cpu.ENGINE, _cpu.GLOO, _cpu.RAY_WITHIN, _cpu.RAY]
    return Report(
        figures=figures,
        tables=[
            Table(
                title="Medians",
                columns=("server", "way of a request, ms", "processor time a token, us"),
                rows=[
                    (
                        name,
                        1000 * statistics.median(measured.ways_s[name]),
                        1e6 * statistics.median(measured.token_s[name]),
                    )
                    for name in measured.ways_s
                ],
            ),
            Table(
                title=f"Idle for {size.idle_s:.0f} s, % of a core",
                columns=("server", *parts),
                rows=[
                    (name, *(100 * used[part] for part in parts))
                    for name, used in measured.idle.items()
                ],
            ),
        ],
    )


if __name__ == "__main__":
    sys.exit(main(run))
