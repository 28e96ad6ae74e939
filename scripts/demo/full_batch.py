"""Full batches whose requests move all the time, and every answer compared with what it is alone.

Each question is asked once while nothing else runs; then almost as many at a time as the batches
hold, at first without a move, then with as many moves as the instances carry out, each of which
fills the batch that it leads to. Half of the answers are sampled with a seed. This module does not
know what the engines compute on.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llumsched.commands import CommandError
from llumsched.commands._admin import AdminClient
from scripts.demo import story
from scripts.demo.client import Answer, Client
from scripts.demo.running import quiet
from scripts.demo.screen import Screen
from scripts.demo.stage import POLL_INTERVAL_S, Check, Stage, beside

NUM_MOVERS = 4
# When nothing could be moved.
REST_S = 0.05
NUM_REASONS_SHOWN = 3
# For the answers under way to end, and all processes.
END_S = 25.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt with its sampling; greedy without a ``seed``."""

    prompt: str
    seed: int | None

    async def ask(self, client: Client, max_tokens: int, **options: Any) -> Answer:
        """Stream the answer, of ``max_tokens`` tokens."""
        temperature = 0.0 if self.seed is None else 0.8
        return await client.chat(
            self.prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=self.seed,
            to_the_end=True,
            **options,
        )


def questions(number: int) -> list[Question]:
    """So many; every other one is sampled."""
    prompts = [*story.CHATS, *story.passages()][:number]
    return [
        Question(prompt=prompt, seed=index if index % 2 else None)
        for index, prompt in enumerate(prompts)
    ]


@dataclass(slots=True, kw_only=True)
class Seen:
    """Observations while the batches were full. ``moves`` are the server's reports, by the ids
    that clients know; ``num_looks_full`` of ``num_looks`` found a batch full, while moving."""

    answers: dict[str, Answer] = field(default_factory=dict)
    differing: list[str] = field(default_factory=list)
    moves: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    moving_since_s: float = float("inf")
    moved_for_s: float = float("inf")
    num_looks: int = 0
    num_looks_full: int = 0
    most_waiting: int = 0

    def gaps_s(self, *, moving: bool) -> list[float]:
        """Between two tokens of an answer, before the first move or since."""
        return sorted(
            answer.gap_s(token)
            for answer in self.answers.values()
            for token in range(1, answer.num_tokens)
            if (answer.times_s[token] >= self.moving_since_s) is moving
        )

    def pauses_s(self) -> list[float]:
        """Waits of clients for the first token after a move."""
        return sorted(
            self.answers[request_id].gap_s(report["num_output_tokens"])
            for request_id, report in self.moves
            if request_id in self.answers
            and 0 < report["num_output_tokens"] < self.answers[request_id].num_tokens
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """``num_streams`` answers of ``max_tokens`` tokens at a time, for ``still_s`` without and
    ``moving_s`` with moves, on instances of ``max_num_seqs`` requests at a time. Both are shorter
    if all would not be over by ``ends_at_s`` (``time.monotonic()``)."""

    max_num_seqs: int
    num_streams: int
    num_questions: int
    max_tokens: int
    still_s: float
    moving_s: float
    ends_at_s: float

    async def act(self, screen: Screen, url: str) -> list[Check]:
        """Ask each question alone, then fill the batches; show and claim what was seen."""
        asked = questions(self.num_questions)
        async with Client(url) as client:
            stage = Stage(screen=screen, client=client, admin=AdminClient(url))
            before = {instance["instance_id"] for instance in await stage.instances()}
            async with screen.waiting(f"{len(asked)} answers, each computed alone, to compare"):
                alone = [await question.ask(client, self.max_tokens) for question in asked]
            seen = Seen()
            await self._fill(stage, asked, alone, seen)
            after = {instance["instance_id"] for instance in await stage.instances()}
            free = await quiet(stage)
        self._show(screen, seen)
        checks = [*self._claims(seen, num_alone=len(alone)), _same(before, after), *free]
        screen.line()
        for check in checks:
            screen.check(check.holds, check.text)
        return checks

    async def _fill(
        self, stage: Stage, asked: Sequence[Question], alone: Sequence[Answer], seen: Seen
    ) -> None:
        left_s = max(0.0, self.ends_at_s - time.monotonic() - END_S)
        still_s = min(self.still_s, left_s / 4)
        moving_s = min(self.moving_s, left_s - still_s)
        ending = asyncio.Event()
        turns = itertools.cycle(range(len(asked)))
        streams = [
            asyncio.create_task(self._stream(stage.client, asked, alone, turns, seen, ending))
            for _ in range(self.num_streams)
        ]
        try:
            async with stage.screen.waiting("full batches, nothing moves"):
                await _while_they_live(streams, still_s)
            seen.moving_since_s = time.perf_counter()
            async with (
                stage.screen.waiting("full batches, requests move all the time"),
                beside(self._move(stage, seen)),
                beside(self._look(stage, seen)),
            ):
                await _while_they_live(streams, moving_s)
                ending.set()
                await asyncio.gather(*streams)
            seen.moved_for_s = time.perf_counter() - seen.moving_since_s
        finally:
            for stream in streams:
                stream.cancel()

    async def _stream(
        self,
        client: Client,
        asked: Sequence[Question],
        alone: Sequence[Answer],
        turns: Iterator[int],
        seen: Seen,
        ending: asyncio.Event,
    ) -> None:
        """One answer after the other, each compared, until ``ending`` is set."""
        while not ending.is_set():
            turn = next(turns)
            answer = await asked[turn].ask(client, self.max_tokens)
            seen.answers[answer.request_id] = answer
            if answer.token_ids != alone[turn].token_ids:
                seen.differing.append(answer.request_id)

    async def _move(self, stage: Stage, seen: Seen) -> None:
        """Ask for one move after the other, of requests that have moved least."""
        moving: set[str] = set()

        async def mover() -> None:
            while True:
                candidates = [
                    request
                    for request in await asyncio.to_thread(stage.admin.requests)
                    if request["num_output_tokens"] and request["external_id"] not in moving
                ]
                if not candidates:
                    await asyncio.sleep(REST_S)
                    continue
                request_id = min(candidates, key=lambda request: request["num_moves"])[
                    "external_id"
                ]
                moving.add(request_id)
                try:
                    report = await asyncio.to_thread(stage.admin.migrate, request_id)
                    seen.moves.append((request_id, report))
                except CommandError as error:
                    seen.reasons[str(error)] += 1
                    await asyncio.sleep(REST_S)
                finally:
                    moving.discard(request_id)

        await asyncio.gather(*(mover() for _ in range(NUM_MOVERS)))

    async def _look(self, stage: Stage, seen: Seen) -> None:
        while True:
            loads = [instance["load"] for instance in await stage.instances()]
            seen.num_looks += 1
            seen.num_looks_full += any(load["num_running"] >= self.max_num_seqs for load in loads)
            seen.most_waiting = max(seen.most_waiting, sum(load["num_waiting"] for load in loads))
            await asyncio.sleep(POLL_INTERVAL_S)

    def _claims(self, seen: Seen, *, num_alone: int) -> list[Check]:
        num_moved = len({request_id for request_id, _ in seen.moves})
        return [
            Check(
                holds=bool(seen.answers) and not seen.differing,
                text=f"all {len(seen.answers)} answers have the tokens of the {num_alone} that were"
                f" computed alone ({len(seen.differing)} differ)",
            ),
            Check(
                holds=bool(seen.moves),
                text=f"{len(seen.moves)} moves, of {num_moved} answers, while they streamed",
            ),
            Check(
                holds=bool(seen.num_looks_full),
                text=f"a batch was full in {seen.num_looks_full} of {seen.num_looks} looks"
                f" ({self.max_num_seqs} requests, up to {seen.most_waiting} more waiting)",
            ),
        ]

    def _show(self, screen: Screen, seen: Seen) -> None:
        still, moving = seen.gaps_s(moving=False), seen.gaps_s(moving=True)
        pauses = seen.pauses_s()
        suspended = sorted(report["suspended_s"] for _, report in seen.moves)
        screen.heading("Measured in this run")
        screen.facts(
            {
                "moves": f"{len(seen.moves)}, {len(seen.moves) / seen.moved_for_s:.1f} a second",
                "a moved request stood still for": _spread(suspended),
                "pause that its client saw": _spread(pauses),
                "between two tokens, nothing moves": _spread(still),
                "between two tokens, with moves": _spread(moving),
                "worst of all": f"{_ms(still[-1:])} without moves, {_ms(moving[-1:])} with them",
            }
        )
        for reason, number in seen.reasons.most_common(NUM_REASONS_SHOWN):
            screen.paragraph(f"{number} not moved: {reason}")


async def _while_they_live(streams: Sequence[asyncio.Task[None]], seconds: float) -> None:
    """Wait; raise what a stream has ended with."""
    done, _ = await asyncio.wait(streams, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for stream in done:
        stream.result()


def _same(before: set[str], after: set[str]) -> Check:
    names = ", ".join(sorted(before))
    return Check(holds=before == after, text=f"the instances are those of the beginning: {names}")


def _spread(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    p99 = seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))]
    return f"{_ms([statistics.median(seconds)])} (median), {_ms([p99])} (99 %)"


def _ms(seconds: Sequence[float]) -> str:
    return f"{1000 * seconds[0]:,.1f} ms" if seconds else "none"
