"""Every instance replaced under load: what clients see, with migration and without.

Clients stream greedy answers from two instances, each asking again as soon as it has its answer,
while `llumsched restart` drains one instance after the other and starts another in its place. With
migration an instance that drains hands its requests over. Without, all else alike, it gets nothing
new and ends when its last answer does, which is what a router in front of plain vLLM can do.

An answer fails if it is refused, breaks off, or is shorter than was asked for. Gaps between two
tokens and times to the first are told apart by when they ended: before the restart, or during it.
It includes loading the model twice, on the same processor as the answers.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np

from benchmarks._report import Figure, Report, Table, main
from benchmarks._servers import ENGINE_FLAGS, Server, llumsched
from benchmarks._streams import AnswerBroken, Stream, clients, prompt_of, read
from scripts import plots

BENCHMARK = "Rolling restart under load"

NUM_INSTANCES = 2
NUM_CLIENTS = 6
NUM_PROMPT_TOKENS = 128
NUM_OUTPUT_TOKENS = 512
QUICK_NUM_OUTPUT_TOKENS = 64
AT_REST_S = 60.0
QUICK_AT_REST_S = 5.0
POLL_INTERVAL_S = 0.1
RESTART_TIMEOUT_S = 900.0
PLOTS = Path(__file__).parents[1] / "docs" / "benchmarks"

WITH, WITHOUT = "with migration", "without migration"
CONFIGS = {WITH: "policy: latency\n", WITHOUT: "policy: latency\nparts: {migration: none}\n"}


@dataclass(slots=True, kw_only=True)
class Measured:
    """Observations of one server's clients; times are those of this process's clock."""

    streams: list[Stream] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    began_s: float = 0.0
    ended_s: float = 0.0
    emptying_s: dict[str, float] = field(default_factory=dict)
    """By instance, from when it drained to when it had ended."""

    def gaps_s(self, *, during: bool) -> list[float]:
        """Between two tokens of an answer."""
        return self._of_phase((gap for s in self.streams for gap in s.gaps_s()), during)

    def first_s(self, *, during: bool) -> list[float]:
        """From the question to its first token."""
        answered = (s for s in self.streams if s.times_s)
        return self._of_phase(((s.times_s[0], s.times_s[0] - s.asked_s) for s in answered), during)

    def _of_phase(self, values: Iterable[tuple[float, float]], during: bool) -> list[float]:
        first_s, last_s = (self.began_s, self.ended_s) if during else (0.0, self.began_s)
        return [value for ended_s, value in values if first_s <= ended_s < last_s]


def run(quick: bool) -> Report:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, text in CONFIGS.items():
            config = Path(folder) / f"{name.split()[0]}.yaml"
            config.write_text(text, encoding="utf-8")
            flags = (*ENGINE_FLAGS, "--config", str(config))
            with llumsched(NUM_INSTANCES, flags) as server:
                found[name] = asyncio.run(_measure(server, quick))
    if not quick:
        _draw(found)
    plots = [f"![{what}](rolling-restart-{what.lower()}.svg)" for what in ("ITL", "TTFT")]
    return Report(figures=_figures(found), tables=[_latencies(found)], notes=[] if quick else plots)


async def _measure(server: Server, quick: bool) -> Measured:
    measured = Measured()
    num_tokens = QUICK_NUM_OUTPUT_TOKENS if quick else NUM_OUTPUT_TOKENS
    numbers = itertools.count()
    stopping = asyncio.Event()
    async with clients() as session:

        async def ask_again_and_again() -> None:
            while not stopping.is_set():
                await _ask(session, server, next(numbers), num_tokens, measured)

        await _ask(session, server, next(numbers), num_tokens, measured)  # warm-up
        measured.streams.clear()
        asking = [asyncio.create_task(ask_again_and_again()) for _ in range(NUM_CLIENTS)]
        await asyncio.sleep(QUICK_AT_REST_S if quick else AT_REST_S)
        watching = asyncio.create_task(_watch(session, server, measured))
        measured.began_s = time.perf_counter()
        await _restart(server)
        measured.ended_s = time.perf_counter()
        stopping.set()
        watching.cancel()
        await asyncio.wait({watching})
        if not watching.cancelled():
            watching.result()
        await asyncio.gather(*asking)
    return measured


async def _ask(
    session: aiohttp.ClientSession,
    server: Server,
    number: int,
    num_tokens: int,
    measured: Measured,
) -> None:
    stream = Stream()
    try:
        prompt = prompt_of(number, NUM_PROMPT_TOKENS)
        await read(session, server, prompt, stream, num_tokens)
    except (aiohttp.ClientError, AnswerBroken, TimeoutError) as error:
        measured.failures.append(repr(error))
    else:
        if len(stream.token_ids) != num_tokens:
            measured.failures.append(f"{len(stream.token_ids)} tokens")
    measured.streams.append(stream)


async def _watch(session: aiohttp.ClientSession, server: Server, measured: Measured) -> None:
    """Note how long each instance drains: from when it was last seen to take requests."""
    served_s: dict[str, float] = {}
    while True:
        async with session.get(f"{server.url}/llumsched/instances") as response:
            response.raise_for_status()
            pool = await response.json()
        now_s = time.perf_counter()
        for instance in pool["instances"]:
            if instance["state"] == "serving":
                served_s[instance["instance_id"]] = now_s
        running = {b["instance_id"] for b in pool["berths"] if b["state"] == "running"}
        for instance_id in served_s.keys() - running - measured.emptying_s.keys():
            measured.emptying_s[instance_id] = now_s - served_s[instance_id]
        await asyncio.sleep(POLL_INTERVAL_S)


async def _restart(server: Server) -> None:
    command = (sys.executable, "-m", "llumsched", "restart", "--url", server.url)
    process = await asyncio.create_subprocess_exec(*command, cwd=Path(__file__).parents[1])
    try:
        async with asyncio.timeout(RESTART_TIMEOUT_S):
            status = await process.wait()
    except TimeoutError:
        process.kill()
        raise
    if status != 0:
        raise RuntimeError(f"llumsched restart: exit status {status}")


def _figures(found: dict[str, Measured]) -> list[Figure]:
    emptying_s = {name: max(m.emptying_s.values()) for name, m in found.items()}
    return [
        *(
            Figure(
                name=f"answers that failed, {name}",
                value=len(measured.failures),
                unit=f"of {len(measured.streams)}",
                at_most=0,
            )
            for name, measured in found.items()
        ),
        *(
            Figure(name=f"longest drain of an instance, {name}", value=seconds, unit="s")
            for name, seconds in emptying_s.items()
        ),
        Figure(
            name="longest drain, without migration over with",
            value=emptying_s[WITHOUT] / emptying_s[WITH],
            unit="",
            at_least=2,
        ),
        *(
            Figure(
                name=f"p99 gap between tokens, during the restart over at rest, {name}",
                value=_percentile(m.gaps_s(during=True), 99)
                / _percentile(m.gaps_s(during=False), 99),
                unit="",
            )
            for name, m in found.items()
        ),
    ]


def _latencies(found: dict[str, Measured]) -> Table:
    rows: list[list[str | float]] = []
    for name, measured in found.items():
        for phase, during in (("at rest", False), ("during the restart", True)):
            gaps_s = measured.gaps_s(during=during)
            first_s = measured.first_s(during=during)
            rows.append(
                [
                    f"{name}, {phase}",
                    *(1000 * _percentile(gaps_s, p) for p in (50, 99, 100)),
                    *(1000 * _percentile(first_s, p) for p in (50, 99)),
                    f"{len(gaps_s)} gaps, {len(first_s)} answers begun",
                ]
            )
    return Table(
        title="What clients saw, in ms",
        columns=["", "ITL p50", "ITL p99", "ITL max", "TTFT p50", "TTFT p99", "of"],
        rows=rows,
    )


def _percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else float("nan")


def _draw(found: dict[str, Measured]) -> None:
    shares = np.geomspace(1.0, 0.001, 40)
    for what, values_of in (("ITL", Measured.gaps_s), ("TTFT", Measured.first_s)):
        series = {}
        for name, measured in found.items():
            for phase, during in (("at rest", False), ("restart", True)):
                values_ms = 1000 * np.array(values_of(measured, during=during))
                reached = [s for s in shares if s * len(values_ms) >= 1]
                series[f"{phase}, {name.split()[0]}"] = [
                    (max(0.1, float(np.quantile(values_ms, 1 - share))), 100 * share)
                    for share in reached
                ]
        title = f"{what}: share of values above, with migration and without"
        text = plots.lines(title, f"{what} in ms", "% above", series)
        (PLOTS / f"rolling-restart-{what.lower()}.svg").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(run))
