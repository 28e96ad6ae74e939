"""Cost of llumsched over plain vLLM: the way of a request, processor time a token, idle servers.

All servers run at once with the same model and flags: plain vLLM, and pools of one instance and of
two. One at a time is loaded, and they take turns, so a machine that slows down slows all.

The *way* of a request is the time to its first token less what the engine says that it has queued
and computed it (vLLM's own metrics): from the client to the engine and back. So a long step of the
engine is no part of it. *Processor time a token* is that of the frontend, or of vLLM's API server,
with all their threads, while 32 greedy answers stream (prompts of 32 tokens, EOS ignored); *a
request* is the same for answers of one token. Ratios are taken within a round. A server that is
late puts several tokens into one chunk, which makes its tokens cheaper: so chunks a token are told.

*Idle* is a server that serves nothing, by what uses the processor: its own processes without the
threads of Ray and of gloo in them, those threads, and Ray's processes. Plain vLLM's engine has
gloo's threads as well.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from benchmarks import _cpu
from benchmarks._report import Figure, Report, Table, main
from benchmarks._servers import ENGINE_FLAGS, Server, llumsched, plain_vllm
from benchmarks._streams import Stream, clients, prompt_of, read

BENCHMARK = "Overhead of the frontend"

PLAIN = "plain vLLM"
ONE = "llumsched, 1 instance"
TWO = "llumsched, 2 instances"
POOLS = {ONE: 1, TWO: 2}
NUM_STREAMS = 32
NUM_PROMPT_TOKENS = 32
# From the last answer until a server is idle: reports come less often, watchers calm down.
SETTLE_S = 5.0
METRICS_TIMEOUT_S = 10.0
METRICS_INTERVAL_S = 0.05
ENGINE_TIMES = ("vllm:request_queue_time_seconds", "vllm:request_prefill_time_seconds")
# Room enough for all streams, and three servers at once on a small machine.
FLAGS = (*ENGINE_FLAGS[: ENGINE_FLAGS.index("--kv-cache-memory-bytes") + 1], str(1 << 28))


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured. Requests of ``num_ways`` go one after the other, so many a server.

    ``pools`` are those beside plain vLLM, by their number of instances.
    """

    pools: tuple[int, ...]
    num_ways: int
    num_rounds: int
    num_tokens: int
    idle_s: float


FULL = Size(pools=(1, 2), num_ways=40, num_rounds=6, num_tokens=64, idle_s=60.0)
# Most of a quick run are boots.
QUICK = Size(pools=(2,), num_ways=5, num_rounds=1, num_tokens=16, idle_s=10.0)


@dataclass(slots=True, kw_only=True)
class Measured:
    """Figures of one server.

    ``ways_s`` are seconds, a request each. ``token_s``, ``request_s`` and ``chunks`` have a value a
    round: processor time of the frontend for a token and for a request, in seconds, and chunks a
    token. ``idle`` is the share of a core that each part has used while nothing was served.
    """

    ways_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    request_s: list[float] = field(default_factory=list)
    chunks: list[float] = field(default_factory=list)
    idle: Mapping[str, float] = field(default_factory=dict)


def run(quick: bool) -> Report:
    size = QUICK if quick else FULL
    with ExitStack() as stack:
        # One after the other: what boots beside another takes several times as long.
        servers = {PLAIN: stack.enter_context(plain_vllm(FLAGS))}
        for name, num_instances in POOLS.items():
            if num_instances in size.pools:
                servers[name] = stack.enter_context(llumsched(num_instances, FLAGS))
        measured = asyncio.run(_measure(servers, size))
    return _report(measured, size)


async def _measure(servers: Mapping[str, Server], size: Size) -> Mapping[str, Measured]:
    numbers = itertools.count()
    found: dict[str, Measured] = defaultdict(Measured)
    for server in servers.values():  # warm-up, not measured
        await _stream(server, numbers, NUM_STREAMS, 8)
    await asyncio.sleep(SETTLE_S)
    before = {name: _cpu.used_s(server.pid) for name, server in servers.items()}
    started_s = time.monotonic()
    await asyncio.sleep(size.idle_s)
    for name, server in servers.items():
        after, elapsed_s = _cpu.used_s(server.pid), time.monotonic() - started_s
        found[name].idle = {
            part: (after[part] - before[name][part]) / elapsed_s for part in _cpu.PARTS
        }
    print("idle is measured", file=sys.stderr, flush=True)
    for index in range(size.num_ways):
        for name in _turn(servers, index):
            found[name].ways_s.append(await _way(servers[name], numbers))
    print("ways are measured", file=sys.stderr, flush=True)
    for index in range(size.num_rounds):
        for name in _turn(servers, index):
            server, one = servers[name], found[name]
            used_s, _ = await _frontend_used_s(server, numbers, 1)
            one.request_s.append(used_s / NUM_STREAMS)
            used_s, streams = await _frontend_used_s(server, numbers, size.num_tokens)
            one.token_s.append(used_s / (NUM_STREAMS * size.num_tokens))
            one.chunks.append(sum(s.num_chunks for s in streams) / NUM_STREAMS / size.num_tokens)
        print(f"round {index + 1} of {size.num_rounds} is done", file=sys.stderr, flush=True)
    return found


def _turn(servers: Mapping[str, Server], index: int) -> list[str]:
    """Turn about, so that no server always comes first."""
    names = list(servers)
    return names if index % 2 == 0 else names[::-1]


async def _frontend_used_s(
    server: Server, numbers: itertools.count[int], num_tokens: int
) -> tuple[float, list[Stream]]:
    """Processor time, in seconds, that the frontend has used for a round of streams."""
    before_s = _cpu.used_s(server.pid)[_cpu.FRONTENDS]
    streams = await _stream(server, numbers, NUM_STREAMS, num_tokens)
    return _cpu.used_s(server.pid)[_cpu.FRONTENDS] - before_s, streams


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
    found: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found[sample.name] += sample.value
    seconds = sum(found[f"{name}_sum"] for name in ENGINE_TIMES)
    return seconds, found[f"{ENGINE_TIMES[-1]}_count"]


def _report(measured: Mapping[str, Measured], size: Size) -> Report:
    plain = measured[PLAIN]
    figures = []
    for name in (name for name in POOLS if name in measured):
        ours = measured[name]
        added_s = statistics.median(ours.ways_s) - statistics.median(plain.ways_s)
        figures += [
            Figure(
                name=f"{name}: added to the way of a request",
                value=1000 * added_s,
                unit="ms",
                at_most=4,
            ),
            Figure(
                name=f"{name}: processor time a token, ratio to plain vLLM",
                value=_ratio(ours.token_s, plain.token_s),
                unit="",
                # Two engines take twice the steps, and a step costs their frontend something.
                at_most=1.2 if name == ONE else None,
            ),
        ]
    idle = measured[TWO].idle
    figures += [
        Figure(
            name="idle pool of two, without Ray and gloo",
            value=100 * sum(idle[part] for part in _cpu.OURS),
            unit="% of a core",
            at_most=2,
        ),
        Figure(
            name="idle pool of two, Ray",
            value=100 * (idle[_cpu.RAY] + idle[_cpu.RAY_WITHIN]),
            unit="% of a core",
        ),
    ]
    columns = (
        *("server", "way of a request, ms", "processor time a request, us"),
        *("processor time a token, us", "chunks a token"),
    )
    rows = [
        (
            name,
            1000 * statistics.median(one.ways_s),
            1e6 * statistics.median(one.request_s),
            1e6 * statistics.median(one.token_s),
            statistics.median(one.chunks),
        )
        for name, one in measured.items()
    ]
    return Report(
        figures=figures,
        tables=[
            Table(title="Medians", columns=columns, rows=rows),
            Table(
                title=f"Idle for {size.idle_s:.0f} s, % of a core",
                columns=("server", *_cpu.PARTS),
                rows=[
                    (name, *(100 * one.idle[part] for part in _cpu.PARTS))
                    for name, one in measured.items()
                ],
            ),
        ],
    )


def _ratio(ours: Sequence[float], plain: Sequence[float]) -> float:
    """The median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(ours, plain, strict=True))


if __name__ == "__main__":
    sys.exit(main(run))
