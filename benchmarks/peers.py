"""Routers of today beside live migration, on the same two real engines that are short of memory.

`vllm-router` (round robin, power of two, cache-aware) and `smg` (cache-aware) stand before two
plain vLLM servers, and vLLM's own data parallelism runs two engines behind one server; `llumsched`
serves with its default policy. All have the same engine flags and serve the same requests, one
after another, the order turned by one from seed to seed. The shapes of traffic, the loads and the
ratios are those of the benchmark of policies on real engines.

Then, each freshly started, one engine is killed (SIGKILL) while eight answers are streamed, and
questions go on being asked: what the clients of the open answers see, and how many of the next
questions fail.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from benchmarks._contest import Contestant, Running, contest, options, plan_of, pool_contestant
from benchmarks._contest_report import (
    NO_WORSE_THAN,
    goal_figures,
    notes,
    ratio_figures,
    ratio_tables,
)
from benchmarks._peers import peers
from benchmarks._report import Figure, Report, Table, main_with_flags
from benchmarks._shapes import SHAPES
from benchmarks._streams import AnswerBroken, Stream, clients, prompt_of, read

BENCHMARK = "Peers on real engines"

OURS = "llumsched"
SHAPES_HERE = [name for name in SHAPES if name != "priorities"]
LOADS = (0.8, 0.95)
TWICE_AS_GOOD = 0.5
NUM_OPEN, NUM_OPEN_TOKENS, NUM_PROMPT_TOKENS = 8, 96, 32
ASKED_FOR_S, ASKED_EVERY_S, QUESTION_TIMEOUT_S = 20.0, 0.5, 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AfterKill:
    """An engine's death, as clients saw it."""

    name: str
    num_broken: int
    num_wrong: int
    num_asked: int
    num_failed: int


def run(arguments: argparse.Namespace) -> Report:
    plan = plan_of(arguments)
    contestants = [pool_contestant(OURS, "policy: adaptive\n"), *peers()]
    chosen = contestants[:2] if arguments.quick else contestants
    outcome = contest(plan, chosen)
    killed = [] if arguments.quick else [_killed(contestant) for contestant in chosen]
    return Report(
        figures=[
            *goal_figures(outcome, OURS, at_most=TWICE_AS_GOOD),
            *ratio_figures(outcome, OURS, at_most=NO_WORSE_THAN),
            *_kill_figures(killed),
        ],
        tables=[*ratio_tables(outcome, OURS), *_kill_tables(killed)],
        notes=notes(outcome),
    )


def _killed(contestant: Contestant) -> AfterKill:
    with contestant.start() as running:
        seen = asyncio.run(_kill_one(contestant.name, running))
    print(seen, flush=True)
    return seen


async def _kill_one(name: str, running: Running) -> AfterKill:
    server = running.server

    async def ask(number: int, stream: Stream, num_tokens: int) -> bool:
        """True if the answer came whole."""
        prompt = prompt_of(number, NUM_PROMPT_TOKENS)
        try:
            async with asyncio.timeout(QUESTION_TIMEOUT_S):
                await read(session, server, prompt, stream, num_tokens)
        except (aiohttp.ClientError, AnswerBroken, TimeoutError):
            return False
        return len(stream.token_ids) == num_tokens

    async with clients() as session:
        expected = [Stream() for _ in range(NUM_OPEN)]
        for number, stream in enumerate(expected):
            await ask(number, stream, NUM_OPEN_TOKENS)
        streams = [Stream() for _ in range(NUM_OPEN)]
        asking = [
            asyncio.create_task(ask(number, stream, NUM_OPEN_TOKENS))
            for number, stream in enumerate(streams)
        ]
        async with asyncio.timeout(QUESTION_TIMEOUT_S):
            for stream in streams:
                await stream.reach(NUM_OPEN_TOKENS // 8)
        os.kill(running.engine_pids[0], signal.SIGKILL)
        until_s = time.perf_counter() + ASKED_FOR_S
        questions: list[asyncio.Task[bool]] = []
        while time.perf_counter() < until_s:
            number = NUM_OPEN + len(questions)
            questions.append(asyncio.create_task(ask(number, Stream(), NUM_OPEN_TOKENS // 8)))
            await asyncio.sleep(ASKED_EVERY_S)
        whole = await asyncio.gather(*asking)
        answered = await asyncio.gather(*questions)
    wrong = sum(
        is_whole and stream.token_ids != wanted.token_ids
        for is_whole, stream, wanted in zip(whole, streams, expected, strict=True)
    )
    return AfterKill(
        name=name,
        num_broken=whole.count(False),
        num_wrong=wrong,
        num_asked=len(answered),
        num_failed=answered.count(False),
    )


def _kill_figures(killed: Sequence[AfterKill]) -> list[Figure]:
    return [
        figure
        for seen in killed
        if seen.name == OURS
        for figure in (
            Figure(
                name="answers broken or changed by an engine's death",
                value=seen.num_broken + seen.num_wrong,
                unit=f"of {NUM_OPEN}",
                at_most=0,
            ),
            Figure(
                name="questions after it that failed",
                value=seen.num_failed,
                unit=f"of {seen.num_asked}",
                at_most=0,
            ),
        )
    ]


def _kill_tables(killed: Sequence[AfterKill]) -> list[Table]:
    if not killed:
        return []
    return [
        Table(
            title=f"One engine of two is killed while {NUM_OPEN} answers are streamed",
            columns=["", "broken", "with other tokens", "questions after it", "of which failed"],
            rows=[
                [
                    seen.name,
                    float(seen.num_broken),
                    float(seen.num_wrong),
                    float(seen.num_asked),
                    float(seen.num_failed),
                ]
                for seen in killed
            ],
        )
    ]


if __name__ == "__main__":
    sys.exit(main_with_flags(run, options(SHAPES_HERE, LOADS)))
