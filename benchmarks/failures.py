"""How soon a death is noticed, and what clients see of it.

Clients stream greedy answers from two instances, each asking again as soon as it has its answer.
In turn, one instance is killed (SIGKILL), one is stopped (SIGSTOP), which keeps its connections and
would go on if it were let, and the global scheduler is killed. Every answer must have the tokens
that it had while nothing happened.

An instance's death is noticed when the admin API, asked again and again, no longer says that it
runs. Its requests go on at the other instance, which computes what they have had so far; the pause
is the longest gap between two tokens of any answer at that moment. A scheduler that was started
again has its view whole when it knows both instances and the load of each; it says itself how old
it is by then.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks._report import Figure, Report, Table, main
from benchmarks._servers import ENGINE_FLAGS, Server, llumsched, scheduler_of
from benchmarks._streams import AnswerBroken, Stream, clients, prompt_of, read

BENCHMARK = "Failures"

NUM_INSTANCES = 2
NUM_CLIENTS = 4
NUM_PROMPTS = 8
NUM_PROMPT_TOKENS = 128
NUM_OUTPUT_TOKENS = 128
NUM_ROUNDS = 5
POLL_INTERVAL_S = 0.02
AT_REST_S = 5.0
REPLACED_TIMEOUT_S = 240.0
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """Of an instance: when the signal was sent, and times from then on."""

    at_s: float
    noticed_s: float
    replaced_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """Of the scheduler: its age when its view was whole, and how long after the kill that was."""

    age_s: float
    outage_s: float


@dataclass(slots=True, kw_only=True)
class Measured:
    """``streams`` are all answers that clients have had, ``complaints`` what was wrong with any."""

    deaths: dict[str, list[Death]] = field(default_factory=lambda: {name: [] for name in SIGNALS})
    restarts: list[Restart] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def pause_s(self, death: Death) -> float:
        """The longest gap between two tokens in the middle of which the death was noticed."""
        noticed_s = death.at_s + death.noticed_s
        gaps = (gap for stream in self.streams for gap in stream.gaps_s())
        return max((g for until_s, g in gaps if until_s - g <= noticed_s < until_s), default=0.0)


def run(quick: bool) -> Report:
    with llumsched(NUM_INSTANCES, ENGINE_FLAGS) as server:
        measured = asyncio.run(_measure(server, 1 if quick else NUM_ROUNDS))
    return Report(figures=_figures(measured), tables=[_table(measured)])


async def _measure(server: Server, num_rounds: int) -> Measured:
    measured = Measured()
    expected: dict[int, list[int]] = {}
    stopping = asyncio.Event()
    numbers = itertools.count()
    async with clients() as session:
        for number in range(NUM_PROMPTS):
            stream = Stream()
            await _read(session, server, number, stream)
            expected[number] = stream.token_ids

        async def ask_again_and_again() -> None:
            while not stopping.is_set():
                number = next(numbers) % NUM_PROMPTS
                stream = Stream()
                measured.streams.append(stream)
                try:
                    await _read(session, server, number, stream)
                except (aiohttp.ClientError, AnswerBroken, TimeoutError) as error:
                    measured.complaints.append(repr(error))
                else:
                    if stream.token_ids != expected[number]:
                        measured.complaints.append(f"answer {number} has other tokens")

        asking = [asyncio.create_task(ask_again_and_again()) for _ in range(NUM_CLIENTS)]
        for _ in range(num_rounds):
            for name, number in SIGNALS.items():
                await asyncio.sleep(AT_REST_S)
                measured.deaths[name].append(await _end_instance(session, server, number))
            await asyncio.sleep(AT_REST_S)
            measured.restarts.append(await _end_scheduler(session, server))
        stopping.set()
        await asyncio.gather(*asking)
    return measured


async def _read(
    session: aiohttp.ClientSession, server: Server, number: int, stream: Stream
) -> None:
    prompt = prompt_of(number, NUM_PROMPT_TOKENS)
    await read(session, server, prompt, stream, NUM_OUTPUT_TOKENS)


async def _end_instance(
    session: aiohttp.ClientSession, server: Server, number: signal.Signals
) -> Death:
    pool = await _await_that(session, server, _is_whole)
    victim = pool["berths"][0]
    at_s = time.perf_counter()
    os.kill(victim["pid"], number)

    def is_noticed(pool: dict[str, Any]) -> bool:
        running = {b["instance_id"] for b in pool["berths"] if b["state"] == "running"}
        return victim["instance_id"] not in running

    await _await_that(session, server, is_noticed)
    noticed_s = time.perf_counter() - at_s
    await _await_that(session, server, _is_whole)
    return Death(at_s=at_s, noticed_s=noticed_s, replaced_s=time.perf_counter() - at_s)


async def _end_scheduler(session: aiohttp.ClientSession, server: Server) -> Restart:
    await _await_that(session, server, _is_whole)
    process = scheduler_of(server)
    at_s = time.perf_counter()
    process.kill()
    pool = await _await_that(
        session,
        server,
        # An answer of the old one may still be on its way.
        lambda p: _is_whole(p) and p["scheduler_age_s"] < time.perf_counter() - at_s,
    )
    return Restart(age_s=pool["scheduler_age_s"], outage_s=time.perf_counter() - at_s)


def _is_whole(pool: dict[str, Any]) -> bool:
    known = [i for i in pool["instances"] if i["state"] == "serving" and i["load"]]
    return len(known) == NUM_INSTANCES


async def _await_that(
    session: aiohttp.ClientSession, server: Server, holds: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """The first answer of the admin API of which it holds."""
    async with asyncio.timeout(REPLACED_TIMEOUT_S):
        while True:
            async with session.get(f"{server.url}/llumsched/instances") as response:
                if response.status == 200:  # else the scheduler is away
                    pool: dict[str, Any] = await response.json()
                    if holds(pool):
                        return pool
            await asyncio.sleep(POLL_INTERVAL_S)


def _figures(measured: Measured) -> list[Figure]:
    return [
        Figure(
            name="answers that failed or differ",
            value=len(measured.complaints),
            unit=f"of {len(measured.streams)}",
            at_most=0,
        ),
        *(
            Figure(
                name=f"an instance that is {name} is noticed, slowest of {len(deaths)}",
                value=max(death.noticed_s for death in deaths),
                unit="s",
                at_most=1,
            )
            for name, deaths in measured.deaths.items()
        ),
        *(
            Figure(
                name=f"longest pause of an answer, instance {name}",
                value=max(measured.pause_s(death) for death in deaths),
                unit="s",
            )
            for name, deaths in measured.deaths.items()
        ),
        Figure(
            name="view of a new scheduler whole, from its start, slowest of "
            f"{len(measured.restarts)}",
            value=max(restart.age_s for restart in measured.restarts),
            unit="s",
            at_most=2,
        ),
        Figure(
            name="the same, from the death of the old one",
            value=max(restart.outage_s for restart in measured.restarts),
            unit="s",
        ),
    ]


def _table(measured: Measured) -> Table:
    rows: list[list[str | float]] = [
        [f"instance {name}", death.noticed_s, measured.pause_s(death), death.replaced_s]
        for name, deaths in measured.deaths.items()
        for death in deaths
    ]
    rows += [["scheduler killed", "", "", restart.outage_s] for restart in measured.restarts]
    return Table(
        title="Each death, in seconds",
        columns=["what", "noticed", "longest pause of an answer", "another serves"],
        rows=rows,
    )


if __name__ == "__main__":
    sys.exit(main(run))
