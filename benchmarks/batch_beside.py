"""A batch of small requests beside interactive traffic: what it costs those who wait for tokens.

Two real instances behind one endpoint, and `llumsched batch` beside it. Interactive requests come
by themselves at random moments, at the same rate through all of it: first without a batch, then
while the lines of a batch are done, then without once more. The first token's time is that of the
interactive requests alone. The batch has the lowest class and as many lines in flight as the
scheduler says there is room for.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

from benchmarks._report import Figure, Report, Table, main
from benchmarks._servers import ENGINE_FLAGS, Server, launched, llumsched
from benchmarks._streams import Stream, clients, prompt_of, read

BENCHMARK = "A batch beside interactive traffic"

NUM_INSTANCES = 2
RATE_RPS = 2.0
NUM_PROMPT_TOKENS = 64
NUM_OUTPUT_TOKENS = 32
NUM_LINES = 2000
QUICK_NUM_LINES = 60
NUM_BATCH_TOKENS = 8
SECONDS_WITHOUT = 120.0
QUICK_SECONDS_WITHOUT = 20.0
MOST_SECONDS_WITH = 1500.0
QUICK_MOST_SECONDS_WITH = 90.0
SEED = 21


@dataclass(slots=True, kw_only=True)
class Phase:
    """Interactive requests of one stretch of time."""

    name: str
    lasted_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    num_failed: int = 0

    def quantile_ms(self, share: float) -> float:
        """A quantile of the time to the first token."""
        return 1000 * float(np.quantile(self.ttft_s, share)) if self.ttft_s else float("nan")


def run(quick: bool) -> Report:
    with tempfile.TemporaryDirectory() as folder, llumsched(NUM_INSTANCES, ENGINE_FLAGS) as server:
        database = f"sqlite:///{folder}/batch.db"
        command = [sys.executable, "-m", "llumsched", "batch", "--url", server.url]
        with launched("llumsched batch", [*command, "--database", database]) as (url, _):
            phases, batch, num_answers = asyncio.run(_measure(server, url, quick))
    without = Phase(name="without", ttft_s=phases[0].ttft_s + phases[2].ttft_s)
    counts = batch["request_counts"]
    figures = [
        Figure(
            name="P99 time to first token with the batch, of that without",
            value=phases[1].quantile_ms(0.99) / without.quantile_ms(0.99),
            unit="",
            at_most=1.10,
        ),
        Figure(
            name="median time to first token with the batch, of that without",
            value=phases[1].quantile_ms(0.5) / without.quantile_ms(0.5),
            unit="",
        ),
        Figure(
            name="lines with exactly one answer",
            value=num_answers / counts["total"],
            unit="",
            at_least=1.0,
            at_most=1.0,
        ),
        Figure(
            name="lines done",
            value=(counts["completed"] + counts["failed"]) / phases[1].lasted_s,
            unit="lines/s",
        ),
        Figure(
            name="interactive requests that failed",
            value=sum(phase.num_failed for phase in phases),
            unit="",
            at_most=0.0,
        ),
    ]
    rows: list[tuple[str | float, ...]] = [
        (
            phase.name,
            phase.lasted_s,
            len(phase.ttft_s),
            *(phase.quantile_ms(share) for share in (0.5, 0.9, 0.99)),
            1000 * float(np.mean(phase.gaps_s)) if phase.gaps_s else float("nan"),
        )
        for phase in phases
    ]
    columns = ("batch", "s", "requests", "TTFT P50 ms", "P90 ms", "P99 ms", "mean gap ms")
    note = (
        f"{counts['total']} lines of {NUM_BATCH_TOKENS} output tokens; interactive: {RATE_RPS:g}"
        f" requests/s of {NUM_PROMPT_TOKENS} prompt and {NUM_OUTPUT_TOKENS} output tokens."
        f" Seed: {SEED}. The clients run on the same cores as the server."
    )
    table = Table(title="Interactive requests", columns=columns, rows=rows)
    return Report(figures=figures, tables=[table], notes=[note])


async def _measure(
    server: Server, url: str, quick: bool
) -> tuple[list[Phase], dict[str, Any], int]:
    """The three phases, the batch at its end, and how many lines have exactly one answer."""
    seconds = QUICK_SECONDS_WITHOUT if quick else SECONDS_WITHOUT
    most_s = QUICK_MOST_SECONDS_WITH if quick else MOST_SECONDS_WITH
    phases = [Phase(name=name) for name in ("without", "with", "without, again")]
    async with clients() as session:
        await read(session, server, prompt_of(1, NUM_PROMPT_TOKENS), Stream(), NUM_OUTPUT_TOKENS)
        await _interact(session, server, phases[0], asyncio.sleep(seconds))
        batch_id = await _create(
            session, url, server.model, QUICK_NUM_LINES if quick else NUM_LINES
        )
        await _interact(session, server, phases[1], _until_over(session, url, batch_id, most_s))
        batch = await _json(session, f"{url}/v1/batches/{batch_id}")
        await _interact(session, server, phases[2], asyncio.sleep(seconds))
        num_answers = 0
        if batch["output_file_id"]:
            file = f"{url}/v1/files/{batch['output_file_id']}/content"
            async with session.get(file) as answer:
                lines = (await answer.text()).splitlines()
            num_answers = len({json.loads(line)["custom_id"] for line in lines})
            num_answers -= len(lines) - num_answers
    return phases, batch, num_answers


async def _interact(
    session: aiohttp.ClientSession, server: Server, phase: Phase, lasting: Any
) -> None:
    """Requests at random moments until `lasting` is over; all are awaited."""
    rng = random.Random(f"{SEED}/{phase.name}")
    asking: list[asyncio.Task[None]] = []
    begun_s = time.perf_counter()
    over = asyncio.ensure_future(lasting)
    while not over.done():
        number = rng.randrange(1 << 30)
        asking.append(asyncio.create_task(_ask(session, server, number, phase)))
        await asyncio.wait([over], timeout=rng.expovariate(RATE_RPS))
    await over
    phase.lasted_s = time.perf_counter() - begun_s
    await asyncio.gather(*asking)


async def _ask(session: aiohttp.ClientSession, server: Server, number: int, phase: Phase) -> None:
    stream = Stream()
    try:
        prompt = prompt_of(number, NUM_PROMPT_TOKENS)
        await read(session, server, prompt, stream, NUM_OUTPUT_TOKENS)
    except (aiohttp.ClientError, TimeoutError):
        phase.num_failed += 1
        return
    phase.ttft_s.append(stream.times_s[0] - stream.asked_s)
    phase.gaps_s += [gap for _, gap in stream.gaps_s()]


async def _create(session: aiohttp.ClientSession, url: str, model: str, num_lines: int) -> str:
    lines = [
        {
            "custom_id": f"line-{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {
                "model": model,
                "prompt": prompt_of(2_000_000 + number, 32),
                "max_tokens": NUM_BATCH_TOKENS,
                "ignore_eos": True,
                "temperature": 0,
            },
        }
        for number in range(num_lines)
    ]
    form = aiohttp.FormData()
    form.add_field("purpose", "batch")
    form.add_field("file", "\n".join(map(json.dumps, lines)), filename="lines.jsonl")
    async with session.post(f"{url}/v1/files", data=form) as answer:
        answer.raise_for_status()
        file = await answer.json()
    body = {
        "input_file_id": file["id"],
        "endpoint": "/v1/completions",
        "completion_window": "24h",
    }
    async with session.post(f"{url}/v1/batches", json=body) as answer:
        answer.raise_for_status()
        return str((await answer.json())["id"])


async def _until_over(
    session: aiohttp.ClientSession, url: str, batch_id: str, most_s: float
) -> None:
    until_s = time.perf_counter() + most_s
    while time.perf_counter() < until_s:
        batch = await _json(session, f"{url}/v1/batches/{batch_id}")
        if batch["status"] != "in_progress":
            return
        await asyncio.sleep(1.0)


async def _json(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with session.get(url) as answer:
        answer.raise_for_status()
        found: dict[str, Any] = await answer.json()
        return found


if __name__ == "__main__":
    sys.exit(main(run))
