"""Clients that stream answers, have one of them moved, and note when each token came."""

from __future__ import annotations

import asyncio
import re
import statistics
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks._servers import Server
from benchmarks._streams import TIMEOUT_S, Stream, clients, prompt_of, read

NUM_TOKENS = 64
MOVE_AFTER = 16
POLL_INTERVAL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One migration. ``step_s`` is the median gap of the answer before it was told to move.

    The request decodes from ``decodes_s`` on, is told to move at ``began_s``, and has its last
    token of the source at ``left_s``.
    """

    pause_s: float
    step_s: float
    num_stages: int
    num_bytes: int
    total_s: float
    suspended_s: float
    decodes_s: float
    began_s: float
    left_s: float


class Moves:
    """Measures moves between the two instances of a server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._num_prompts = 0
        self._peak_reserved_blocks = 0

    async def alone(self, contexts: Iterable[int], num_rounds: int) -> dict[int, list[Move]]:
        """Moves of a request that is alone on its instance, by the context it has."""
        found: dict[int, list[Move]] = {context: [] for context in contexts}
        async with clients() as session:
            await self._move_one(session, 64)  # warm-up: the two instances meet
            await self._move_one(session, 64)
            for _ in range(num_rounds):
                for context, moves in found.items():
                    moves.append(await self._move_one(session, context))
        return found

    async def recompute(self, contexts: Iterable[int], num_rounds: int) -> dict[int, list[float]]:
        """Seconds from the last token here to the first one after asking elsewhere again."""
        found: dict[int, list[float]] = {context: [] for context in contexts}
        async with clients() as session:
            for _ in range(num_rounds):
                for context, pauses_s in found.items():
                    prompt = self._prompt(context)
                    stream = Stream()
                    await read(session, self._server, prompt, stream, NUM_TOKENS, until=MOVE_AFTER)
                    again = Stream()
                    # Salted, so that the instance that has the prompt in its cache does not use it.
                    await read(
                        session,
                        self._server,
                        prompt + stream.token_ids,
                        again,
                        2,
                        salt=f"{self._num_prompts}",
                    )
                    pauses_s.append(again.times_s[0] - stream.times_s[-1])
        return found

    async def among_others(
        self, context: int, num_others: int, num_moves: int
    ) -> tuple[list[Move], dict[str, list[float]]]:
        """Moves between loaded instances, and the gaps of the requests that stay.

        Both sides' batches are the same ``before`` and ``during`` a move: it counts as over when
        the request has left, since its absence and its presence change the steps by themselves.
        """
        gaps: dict[str, list[float]] = {
            f"{side}, {when}": []
            for side in ("source", "destination")
            for when in ("before", "during")
        }
        moves = []
        async with clients() as session:
            for _ in range(num_moves):
                others = [Stream() for _ in range(2 * num_others)]
                tasks = [
                    asyncio.create_task(read(session, self._server, self._prompt(64), other, 400))
                    for other in others
                ]
                for other, task in zip(others, tasks, strict=True):
                    await _reached(other, 4, task)
                where = {i["request_id"]: i["instance_id"] for i in await self._requests(session)}
                reports: list[dict[str, Any]] = []
                move = await self._move_one(session, context, reports)
                moves.append(move)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                (report,) = reports
                for other in others:
                    instance = next(
                        (at for name, at in where.items() if name.startswith(other.request_id)), ""
                    )
                    side = "source" if instance == report["source"] else "destination"
                    for ended_s, gap_s in other.gaps_s():
                        started_s = ended_s - gap_s
                        if move.decodes_s <= started_s and ended_s < move.began_s:
                            gaps[f"{side}, before"].append(gap_s)
                        elif move.began_s <= ended_s and started_s < move.left_s:
                            gaps[f"{side}, during"].append(gap_s)
        return moves, gaps

    async def among_prompts(
        self, context: int, num_prompt_tokens: int, num_prompts: int, num_moves: int
    ) -> list[Move]:
        """Moves to an instance that computes prompts; ``step_s`` is that of *its* steps meanwhile.

        The policy takes turns, so every second request goes to the destination: first an answer
        that tells the steps there, then the prompts, with questions for one token between them.
        """
        moves = []
        async with clients() as session:
            for _ in range(num_moves):
                stream, witness = Stream(), Stream()
                tasks = [
                    asyncio.create_task(
                        read(session, self._server, self._prompt(context), stream, 8 * NUM_TOKENS)
                    )
                ]
                await _reached(stream, 2, tasks[0])
                tasks.append(
                    asyncio.create_task(
                        read(session, self._server, self._prompt(64), witness, 8 * NUM_TOKENS)
                    )
                )
                await _reached(witness, 2, tasks[1])
                for _ in range(num_prompts):
                    await read(session, self._server, self._prompt(8), Stream(), 1)
                    known = {each["request_id"] for each in await self._requests(session)}
                    prompt = self._prompt(num_prompt_tokens)
                    tasks.append(
                        asyncio.create_task(read(session, self._server, prompt, Stream(), 2))
                    )
                    await self._one_more_than(known, session)
                move = await self._move(session, stream, tasks[0])
                arrived_s = move.left_s + move.pause_s
                steps_s = [
                    gap
                    for ended_s, gap in witness.gaps_s()
                    if ended_s > move.left_s and ended_s - gap < arrived_s
                ]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                moves.append(replace(move, step_s=statistics.mean(steps_s)))
        return moves

    async def _move_one(
        self,
        session: aiohttp.ClientSession,
        context: int,
        reports: list[dict[str, Any]] | None = None,
    ) -> Move:
        stream = Stream()
        reading = asyncio.create_task(
            read(session, self._server, self._prompt(context), stream, MOVE_AFTER + 4 * NUM_TOKENS)
        )
        move = await self._move(session, stream, reading, reports)
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading
        return move

    async def _move(
        self,
        session: aiohttp.ClientSession,
        stream: Stream,
        reading: asyncio.Task[None],
        reports: list[dict[str, Any]] | None = None,
    ) -> Move:
        """Move the request of a stream that ``reading`` reads."""
        await _reached(stream, MOVE_AFTER, reading)
        began_s = time.perf_counter()
        body = {"request_id": stream.request_id}
        async with session.post(f"{self._server.url}/llumsched/migrations", json=body) as response:
            report = await response.json()
            if response.status != 200:
                raise RuntimeError(f"not migrated: {report}")
        last = int(report["num_output_tokens"])
        await _reached(stream, last + 8, reading)
        if reports is not None:
            reports.append(report)
        before = [gap for end, gap in stream.gaps_s() if end < began_s]
        return Move(
            pause_s=stream.times_s[last] - stream.times_s[last - 1],
            step_s=statistics.median(before[2:]),
            num_stages=report["num_stages"],
            num_bytes=report["num_bytes"],
            total_s=report["total_s"],
            suspended_s=report["suspended_s"],
            decodes_s=stream.times_s[1],
            began_s=began_s,
            left_s=stream.times_s[last - 1],
        )

    async def watch_blocks(self, context: int, num_moves: int) -> int:
        """The most blocks that were reserved at a time while such requests moved.

        Apart from the moves that are timed, as asking for them takes time as well.
        """
        async with clients() as session:
            watching = asyncio.create_task(self._watch_blocks(session))
            for _ in range(num_moves):
                await self._move_one(session, context)
            watching.cancel()
        return self._peak_reserved_blocks

    async def _watch_blocks(self, session: aiohttp.ClientSession) -> None:
        while True:
            async with session.get(f"{self._server.url}/llumsched/instances") as response:
                described = await response.json()
            for instance in described["instances"]:
                reserved = instance["load"]["num_reserved_blocks"]
                self._peak_reserved_blocks = max(self._peak_reserved_blocks, reserved)
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _one_more_than(self, known: set[str], session: aiohttp.ClientSession) -> None:
        """Wait until another request was sent to an instance."""
        while True:
            if {request["request_id"] for request in await self._requests(session)} - known:
                return
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _requests(self, session: aiohttp.ClientSession) -> list[dict[str, Any]]:
        async with session.get(f"{self._server.url}/llumsched/requests") as response:
            found: list[dict[str, Any]] = (await response.json())["requests"]
            return found

    def _prompt(self, context: int) -> list[int]:
        """Tokens that no prompt before had in this order."""
        self._num_prompts += 1
        return prompt_of(self._num_prompts, context)


async def _reached(stream: Stream, num_tokens: int, reading: asyncio.Task[None]) -> None:
    """Wait until the stream that ``reading`` reads has so many tokens."""
    reaching = asyncio.create_task(stream.reach(num_tokens))
    done, _ = await asyncio.wait(
        {reading, reaching}, timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
    )
    if reaching in done:
        return
    reaching.cancel()
    if reading not in done:
        raise TimeoutError("the answer did not come")
    await reading  # raises what ended it
    raise RuntimeError("the answer ended before it had moved")


def staging_num_bytes(pid: int) -> int:
    """Bytes of staging memory that the processes below ``pid`` have: each ring counted once."""
    sizes: dict[str, int] = {}
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                if "memfd:llumsched-kv" in line:
                    inode = line.split()[4]
                    start, end = re.split("-", line.split()[0])
                    sizes[inode] = int(end, 16) - int(start, 16)
    return sum(sizes.values())
