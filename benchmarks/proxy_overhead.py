"""Cost of a front door: llumsched's proxy, vllm-router and smg before the same two servers.

The servers answer at once and compute nothing, so that all that is measured is the way through the
router; an engine's steps, which are hundreds of times as long, would hide it. Every contestant runs
all the time; rounds go from one to the next, and back. A round is as many clients as the
concurrency says, each of which asks again as soon as its answer of 16 tokens has ended, over
connections that stay open. Added time to the first token is that of the round less that of the
round without a router just before. Clients, servers and routers share the machine, and a client
here costs more than a router: throughput is held against that of the peers, not against none.

Then the same at 32 clients while 1,000 streams are open through each router.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import aiohttp
import psutil

from benchmarks._peers import environment
from benchmarks._report import Figure, Report, Table, main
from benchmarks._servers import launched
from benchmarks._stand_in import MODEL
from scripts.server_process import free_port

BENCHMARK = "Overhead of the proxy"

OURS = "llumsched"
DIRECT = "no router"
CONCURRENCIES = (1, 32, 256)
NUM_HELD, HELD_CONCURRENCY = 1000, 32
NUM_TOKENS = 16
NUM_PROMPT_WORDS = 64
NUM_ROUNDS, ROUND_S = 9, 2.0
NUM_QUICK_ROUNDS, QUICK_ROUND_S = 2, 0.7
TIMEOUT_S = 60.0
NUM_FILES = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """A front door that serves: its process, and those below it, are its cost."""

    name: str
    url: str
    pid: int

    def cpu_s(self) -> float:
        """Processor time of its processes so far."""
        process = psutil.Process(self.pid)
        times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
        return sum(t.user + t.system for t in times)


@dataclass(slots=True, kw_only=True)
class Seen:
    """Rounds of one router at one concurrency, an entry each."""

    ttft_s: list[float] = field(default_factory=list)
    rate_rps: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    """Of the router, a request."""
    num_failed: int = 0


def run(quick: bool) -> Report:
    _allow_files(NUM_FILES)
    num_rounds, round_s = (NUM_QUICK_ROUNDS, QUICK_ROUND_S) if quick else (NUM_ROUNDS, ROUND_S)
    with _routers() as routers:
        seen = asyncio.run(_measure(routers, num_rounds, round_s))
    cases = list(dict.fromkeys(case for case, _ in seen))
    peers = [router.name for router in routers if router.name not in (OURS, DIRECT)]
    figures = [figure for case in cases for figure in _figures(case, peers, seen)]
    failed = sum(each.num_failed for (_, name), each in seen.items() if name == OURS)
    figures.append(Figure(name="requests of ours that failed", value=failed, unit="", at_most=0))
    return Report(figures=figures, tables=[_table(case, seen) for case in cases])


def _figures(case: str, peers: list[str], seen: Mapping[tuple[str, str], Seen]) -> Iterator[Figure]:
    added = {name: _added_ms(case, name, seen) for name in (OURS, *peers)}
    best = min(added[name] for name in peers)
    yield Figure(name=f"added time to first token, {case}", value=added[OURS], unit="ms")
    yield Figure(
        name=f"added time to first token, {case}, over the better of the peers",
        value=added[OURS] / best if best > 0 else float("nan"),
        unit="",
        at_most=1.0,
    )
    ours = seen[case, OURS].rate_rps
    yield Figure(
        name=f"requests a second, {case}, over the better of the peers",
        value=min(
            statistics.median(a / b for a, b in zip(ours, seen[case, name].rate_rps, strict=True))
            for name in peers
        ),
        unit="",
        at_least=1.0,
    )


def _added_ms(case: str, name: str, seen: Mapping[tuple[str, str], Seen]) -> float:
    pairs = zip(seen[case, name].ttft_s, seen[case, DIRECT].ttft_s, strict=True)
    return 1000 * statistics.median(with_s - without_s for with_s, without_s in pairs)


def _table(case: str, seen: Mapping[tuple[str, str], Seen]) -> Table:
    rows = [
        (
            name,
            1000 * statistics.median(each.ttft_s),
            statistics.median(each.rate_rps),
            1000 * statistics.median(each.cpu_s),
            str(each.num_failed),
        )
        for (of, name), each in seen.items()
        if of == case
    ]
    columns = ("", "TTFT P50, ms", "requests a second", "router's ms of processor a request")
    return Table(title=case[0].upper() + case[1:], columns=(*columns, "failed"), rows=rows)


async def _measure(
    routers: list[Router], num_rounds: int, round_s: float
) -> dict[tuple[str, str], Seen]:
    seen: dict[tuple[str, str], Seen] = {}
    cases = [(f"{number} at a time", number) for number in CONCURRENCIES]
    async with _client() as session:
        for router in routers:
            await _round(session, router, 1, 0.2, Seen())  # connections are made
        for case, concurrency in cases:
            await _rounds(session, routers, case, concurrency, num_rounds, round_s, seen)
        async with AsyncExitStack() as held:
            for router in routers:
                await _hold(session, router, held)
            case = f"{HELD_CONCURRENCY} at a time beside {NUM_HELD} open streams"
            await _rounds(session, routers, case, HELD_CONCURRENCY, num_rounds, round_s, seen)
    return seen


async def _rounds(
    session: aiohttp.ClientSession,
    routers: list[Router],
    case: str,
    concurrency: int,
    num_rounds: int,
    round_s: float,
    seen: dict[tuple[str, str], Seen],
) -> None:
    for number in range(num_rounds):
        # There and back: who comes later in one round comes sooner in the next.
        for router in routers if number % 2 == 0 else reversed(routers):
            each = seen.setdefault((case, router.name), Seen())
            await _round(session, router, concurrency, round_s, each)
    print(f"{case}: done", file=sys.stderr, flush=True)


async def _round(
    session: aiohttp.ClientSession, router: Router, concurrency: int, round_s: float, seen: Seen
) -> None:
    ttft_s: list[float] = []
    cpu_before_s = router.cpu_s()
    began_s = time.perf_counter()
    until_s = began_s + round_s

    async def ask_on(client: int) -> None:
        number = 0
        while time.perf_counter() < until_s:
            asked_s = time.perf_counter()
            try:
                async with session.post(
                    f"{router.url}/v1/completions", json=_body(f"{client} {number}")
                ) as response:
                    response.raise_for_status()
                    answer = await response.content.readany()
                    ttft_s.append(time.perf_counter() - asked_s)
                    answer += await response.content.read()
                    if not answer.endswith(b"data: [DONE]\n\n"):
                        raise aiohttp.ClientPayloadError("the stream has no end")
            except aiohttp.ClientError:
                seen.num_failed += 1
            number += 1

    await asyncio.gather(*(ask_on(client) for client in range(concurrency)))
    lasted_s = time.perf_counter() - began_s
    seen.ttft_s.append(statistics.median(ttft_s))
    seen.rate_rps.append(len(ttft_s) / lasted_s)
    seen.cpu_s.append((router.cpu_s() - cpu_before_s) / len(ttft_s))


async def _hold(session: aiohttp.ClientSession, router: Router, held: AsyncExitStack) -> None:
    """Open streams whose first token has come, until the stack is left."""
    for number in range(NUM_HELD):
        body = {**_body(f"held {number}"), "user": "hold"}
        response = await held.enter_async_context(
            session.post(f"{router.url}/v1/completions", json=body)
        )
        response.raise_for_status()
        await response.content.readany()


def _body(name: str) -> dict[str, object]:
    prompt = f"{name} " + "word " * NUM_PROMPT_WORDS
    return {"model": MODEL, "prompt": prompt, "max_tokens": NUM_TOKENS, "stream": True}


@asynccontextmanager
async def _client() -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_S, sock_read=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        yield session


@contextmanager
def _routers() -> Iterator[list[Router]]:
    """Every contestant before the same two servers, and the first of these without any."""
    with ExitStack() as stack:
        stand_in = [sys.executable, "-m", "benchmarks._stand_in"]
        servers = [stack.enter_context(launched("a stand-in", stand_in)) for _ in range(2)]
        urls = [url for url, _ in servers]
        folder = environment() / "bin"
        backends = [word for url in urls for word in ("--backend", url)]
        commands = {
            OURS: [sys.executable, "-m", "llumsched", "serve", *backends],
            "vllm-router": [
                *(str(folder / "vllm-router"), "--policy", "round_robin"),
                *("--log-level", "warning", "--prometheus-port", str(free_port())),
                *("--worker-urls", *urls),
            ],
            "smg": [
                *(str(folder / "smg"), "launch", "--policy", "round_robin"),
                *("--log-level", "warn", "--prometheus-port", str(free_port())),
                *("--worker-urls", *urls),
            ],
        }
        routers = [Router(name=DIRECT, url=urls[0], pid=servers[0][1])]
        for name, command in commands.items():
            url, pid = stack.enter_context(launched(name, command))
            routers.append(Router(name=name, url=url, pid=pid))
        yield routers


def _allow_files(number: int) -> None:
    """Let this process and those it starts have as many sockets as they hold streams."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    os.environ.setdefault("RUST_LOG", "warn")
    sys.exit(main(run))
