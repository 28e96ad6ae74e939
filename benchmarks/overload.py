"""Ten times as many requests as an instance can serve: what is turned away, and what that costs.

One real instance with bounded queues. Its capacity is measured first, by as many clients as it runs
sequences at a time, each asking again as soon as it has its answer. Then requests come by
themselves, whether the earlier ones are answered or not, at the capacity and at ten times as many a
second: at random moments, half of them from one client, the others from seven.

What is admitted is answered; the rest gets 503 or, where one client holds its share of the queue,
429. Goodput is what was answered in a second. Memory is the resident memory of frontend and
scheduler together, sampled through all of it: that at the end of the overload over that when it
began, when everything that is built only once has been.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from benchmarks._report import Figure, Report, Table, main
from benchmarks._servers import ENGINE_FLAGS, Server, frontend_of, llumsched, scheduler_of
from benchmarks._streams import clients, prompt_of

BENCHMARK = "Overload"

CONFIG = """
policy: latency
scheduler:
  max_waiting_per_instance: 8
  max_queued_requests: 32
  max_queued_per_client: 8
  queue_timeout_s: 10.0
  fair_clients: true
"""
MAX_NUM_SEQS = 8
NUM_PROMPT_TOKENS = 64
NUM_OUTPUT_TOKENS = 64
OVERLOAD = 10
NUM_CLIENTS = 8
SAMPLE_INTERVAL_S = 0.5
SECONDS = 120.0
QUICK_SECONDS = 8.0
SEED = 5


@dataclass(slots=True, kw_only=True)
class Phase:
    """Outcome of the requests of one rate; ``memory_num_bytes`` is sampled through it."""

    rate_rps: float
    lasted_s: float = 0.0
    statuses: Counter[int | str] = field(default_factory=Counter)
    num_without_retry_after: int = 0
    memory_num_bytes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_asked(self) -> int:
        return self.statuses.total()

    @property
    def num_rejected(self) -> int:
        return self.statuses[429] + self.statuses[503]

    @property
    def num_failed(self) -> int:
        """Neither answered nor turned away."""
        return self.num_asked - self.num_rejected - self.statuses[200]

    @property
    def goodput_rps(self) -> float:
        return self.statuses[200] / self.lasted_s

    def memory_at(self, *, end: bool) -> int:
        """Frontend and scheduler together, a tenth of the time averaged."""
        totals = [sum(sample) for sample in self.memory_num_bytes]
        num_averaged = max(1, len(totals) // 10)
        part = totals[-num_averaged:] if end else totals[:num_averaged]
        return sum(part) // len(part)


def run(quick: bool) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "overload.yaml"
        config.write_text(CONFIG, encoding="utf-8")
        flags = (*ENGINE_FLAGS, "--config", str(config), "--max-num-seqs", str(MAX_NUM_SEQS))
        with llumsched(1, flags) as server:
            capacity_rps, phases = asyncio.run(
                _measure(server, QUICK_SECONDS if quick else SECONDS)
            )
    return Report(
        figures=_figures(capacity_rps, phases),
        tables=[_answers(phases), _memory(phases)],
        notes=[f"Seed: {SEED}. The clients run on the same cores as the server."],
    )


async def _measure(server: Server, seconds: float) -> tuple[float, dict[int, Phase]]:
    async with clients() as session:
        capacity = await _saturate(session, server, seconds)
        phases = {}
        for factor in (1, OVERLOAD):
            phases[factor] = await _flood(session, server, factor * capacity.goodput_rps, seconds)
    return capacity.goodput_rps, phases


async def _saturate(session: aiohttp.ClientSession, server: Server, seconds: float) -> Phase:
    """As many clients as sequences run at a time; what they get in a second is the capacity."""
    phase = Phase(rate_rps=float("nan"))
    numbers = iter(range(1_000_000_000))
    until_s = time.perf_counter() + seconds

    async def ask_again_and_again(client: int) -> None:
        while time.perf_counter() < until_s:
            await _ask(session, server, next(numbers), f"steady-{client}", phase)

    await _ask(session, server, next(numbers), "warm-up", Phase(rate_rps=0.0))
    began_s = time.perf_counter()
    await asyncio.gather(*(ask_again_and_again(client) for client in range(MAX_NUM_SEQS)))
    phase.lasted_s = time.perf_counter() - began_s
    return phase


async def _flood(
    session: aiohttp.ClientSession, server: Server, rate_rps: float, seconds: float
) -> Phase:
    """Requests at random moments, ``rate_rps`` a second; all are awaited."""
    phase = Phase(rate_rps=rate_rps)
    rng = random.Random(f"{SEED}/{rate_rps:g}")
    asking: list[asyncio.Task[None]] = []
    async with _sampled(server, phase):
        began_s = time.perf_counter()
        due_s = began_s
        while due_s < began_s + seconds:
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            client = 0 if rng.random() < 0.5 else rng.randrange(1, NUM_CLIENTS)
            number = len(asking) + rng.randrange(1 << 30)
            asked = _ask(session, server, number, f"client-{client}", phase)
            asking.append(asyncio.create_task(asked))
            due_s += rng.expovariate(rate_rps)
        await asyncio.gather(*asking)
        phase.lasted_s = time.perf_counter() - began_s
    return phase


async def _ask(
    session: aiohttp.ClientSession, server: Server, number: int, client: str, phase: Phase
) -> None:
    body = {
        "model": server.model,
        "prompt": prompt_of(number, NUM_PROMPT_TOKENS),
        "max_tokens": NUM_OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    url, headers = f"{server.url}/v1/completions", {"X-Client-Id": client}
    try:
        async with session.post(url, json=body, headers=headers) as response:
            await response.read()
            phase.statuses[response.status] += 1
            if response.status in (429, 503) and "Retry-After" not in response.headers:
                phase.num_without_retry_after += 1
    except (aiohttp.ClientError, TimeoutError) as error:
        phase.statuses[type(error).__name__] += 1


@contextlib.asynccontextmanager
async def _sampled(server: Server, phase: Phase) -> AsyncIterator[None]:
    """While this lasts, the memory of frontend and scheduler is noted."""
    frontend = frontend_of(server)
    scheduler = scheduler_of(server)

    async def sample() -> None:
        while True:
            sizes = (frontend.memory_info().rss, scheduler.memory_info().rss)
            phase.memory_num_bytes.append(sizes)
            await asyncio.sleep(SAMPLE_INTERVAL_S)

    sampling = asyncio.create_task(sample())
    try:
        yield
    finally:
        sampling.cancel()


def _figures(capacity_rps: float, phases: dict[int, Phase]) -> list[Figure]:
    steady, flood = phases[1], phases[OVERLOAD]
    rejected = steady.num_rejected + flood.num_rejected
    told = rejected - steady.num_without_retry_after - flood.num_without_retry_after
    return [
        Figure(name="capacity", value=capacity_rps, unit="requests/s"),
        *(
            Figure(
                name=f"turned away at {factor} x the capacity",
                value=100 * phase.num_rejected / phase.num_asked,
                unit="%",
            )
            for factor, phase in phases.items()
        ),
        Figure(
            name="neither answered nor turned away",
            value=steady.num_failed + flood.num_failed,
            unit=f"of {steady.num_asked + flood.num_asked}",
            at_most=0,
        ),
        Figure(
            name="turned away with Retry-After",
            value=100 * told / rejected if rejected else 100.0,
            unit="%",
            at_least=100,
        ),
        Figure(
            name=f"goodput at {OVERLOAD} x over that at 1 x",
            value=flood.goodput_rps / steady.goodput_rps,
            unit="",
            at_least=0.9,
        ),
        Figure(
            name=f"memory of frontend and scheduler, end of {OVERLOAD} x over its begin",
            value=flood.memory_at(end=True) / flood.memory_at(end=False),
            unit="",
            at_most=1.05,
        ),
        Figure(
            name=f"memory of frontend and scheduler, end of {OVERLOAD} x over end of 1 x",
            value=flood.memory_at(end=True) / steady.memory_at(end=True),
            unit="",
            at_most=1.1,
        ),
    ]


def _answers(phases: dict[int, Phase]) -> Table:
    kinds = sorted({status for phase in phases.values() for status in phase.statuses}, key=str)
    return Table(
        title="Answers, by status",
        columns=["load", "asked a second", "answered a second", *(str(kind) for kind in kinds)],
        rows=[
            [
                f"{factor} x",
                phase.rate_rps,
                phase.goodput_rps,
                *(float(phase.statuses[kind]) for kind in kinds),
            ]
            for factor, phase in phases.items()
        ],
    )


def _memory(phases: dict[int, Phase]) -> Table:
    rows: list[list[str | float]] = []
    for factor, phase in phases.items():
        for which, name in enumerate(("frontend", "scheduler")):
            sizes = [sample[which] / 2**20 for sample in phase.memory_num_bytes]
            rows.append([f"{name}, {factor} x", sizes[0], sizes[-1], max(sizes)])
    return Table(
        title="Resident memory, in MiB", columns=["", "first", "last", "largest"], rows=rows
    )


if __name__ == "__main__":
    sys.exit(main(run))
