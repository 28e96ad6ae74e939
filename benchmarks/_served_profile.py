"""A hardware file's numbers, measured on instances as they serve.

`llumsched profile` measures one engine with nothing beside it. Where frontend and clients share the
cores with the engines, a step takes longer than that; here it is measured through the API, while
every instance does the same, and once more while one of them has nothing to do. A step is the time
between two tokens of an answer, for a batch whose requests all decode; that of a prompt is the one
for which the requests that it joins wait.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import aiohttp
import msgspec
import numpy as np

from benchmarks._migration_client import Moves
from benchmarks._servers import Server
from benchmarks._streams import Stream, clients, prompt_of, read
from llumsched.core.step_time import MeasuredStep
from llumsched.simulator.hardware.spec import CopyCoefficients, MachineSharing

_NUM_TOKENS = 32
_DECODED_BESIDE = 200
# Within a window in which all decode, the first gaps belong to steps that still had prompts.
_FIRST_GAPS = 2
_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
_SHARED_BATCH_SIZES = (1, 2, 4, 8)
_SHARED_PROMPTS = (256, 500)
SLOWDOWNS = (
    "decodes_by_decodes",
    "decodes_by_prompts",
    "prompts_by_decodes",
    "prompts_by_prompts",
)
# An instance is told that a client has gone, and ends the step that it is in.
_ABORTED_AFTER_S = 0.3
_CONTEXTS = (32, 96, 200, 420, 900)
_PROMPTS = (16, 32, 64, 128, 256, 500)
_NUM_JOINED = (1, 4, 8)
# Of as many tokens a prompt has more pairs than several have: only so are the two told apart.
_SEVERAL_PROMPTS: tuple[tuple[int, ...], ...] = (
    (16,) * 8,
    (32,) * 4,
    (32,) * 8,
    (64,) * 4,
    (128,) * 2,
    (128,) * 3,
    (240,) * 2,
)
_ATTEMPTS = 5
# Enough for requests to reach the scheduler in the order in which they were sent.
_APART_S = 0.005
_LONG_STEP = 1.4
_MOVED_CONTEXTS = (128, 640)


async def measure_steps(
    server: Server, *, num_instances: int, num_kv_tokens: int, every: int = 1
) -> list[MeasuredStep]:
    """Steps of many shapes. Requests that come together must be spread evenly over the instances.

    Args:
        num_kv_tokens: of the KV cache of an instance; no batch needs more.
        every: only one of so many shapes is measured.
    """
    fits = 0.9 * num_kv_tokens
    batches = [[context] * size for size, context in itertools.product(_BATCH_SIZES, _CONTEXTS)]
    batches += [[_CONTEXTS[i % 4] for i in range(size)] for size in _BATCH_SIZES[1:]]
    batches = [batch for batch in batches if sum(batch) + len(batch) * _NUM_TOKENS < fits]
    joined: list[tuple[int, tuple[int, ...]]] = [
        (size, (num_tokens,))
        for num_tokens, size in itertools.product(_PROMPTS, _NUM_JOINED)
        if size * 2 * _CONTEXTS[0] + num_tokens < fits
    ]
    joined += [(_NUM_JOINED[0], prompts) for prompts in _SEVERAL_PROMPTS]
    async with clients() as session:
        served = _Served(session, server, num_instances)
        steps = [await served.batch(batch) for batch in batches[::every]]
        for size, prompts in joined[::every]:
            steps += await served.joined(size, prompts)
    return steps


async def measure_pace(server: Server, *, num_rounds: int) -> float:
    """Seconds of one ordinary step while one request decodes and no other does, on whichever
    instance: how fast a pair is beside another one, whatever its policy."""
    async with clients() as session:
        served = _Served(session, server, 1)
        steps = [await served.batch([_CONTEXTS[0]]) for _ in range(num_rounds)]
    return statistics.median(step.seconds for step in steps)


async def measure_sharing(server: Server, *, num_rounds: int) -> MachineSharing:
    """By how much two instances of this machine slow one another down: medians over batches and
    prompts of several sizes, each measured beside an idle and a busy instance by turns.

    The two instances must take turns in being given requests.
    """
    ratios: dict[str, list[float]] = {name: [] for name in SLOWDOWNS}
    async with clients() as session:
        served = _Served(session, server, 2)
        for _ in range(num_rounds):
            for size in _SHARED_BATCH_SIZES:
                contexts = [_CONTEXTS[0]] * size
                alone_s = (await served.batch(contexts, on_one=True)).seconds
                together_s = (await served.batch(contexts)).seconds
                beside_s = await served.batch_beside_prompts(size, _SHARED_PROMPTS)
                ratios["decodes_by_decodes"].append(together_s / alone_s)
                ratios["decodes_by_prompts"].append(beside_s / alone_s)
            for num_tokens in _SHARED_PROMPTS:
                alone_s = await served.prompt_beside_decodes(num_tokens, 0)
                together_s = (await served.prompt(num_tokens)).seconds
                beside_s = await served.prompt_beside_decodes(num_tokens, 2)
                ratios["prompts_by_prompts"].append(together_s / alone_s)
                ratios["prompts_by_decodes"].append(beside_s / alone_s)
    slowdowns = {
        name: max(0.0, statistics.median(measured) - 1) for name, measured in ratios.items()
    }
    return MachineSharing(num_instances=2, **slowdowns)


def undisturbed(step: MeasuredStep, machine: MachineSharing) -> MeasuredStep:
    """The step as it would be with nothing to do for the other instance, which did the same."""
    did_prompts = step.num_prefill_tokens > 0
    slowdown = machine.prompts_by_prompts if did_prompts else machine.decodes_by_decodes
    return msgspec.structs.replace(step, seconds=step.seconds / (1 + slowdown))


async def measure_copies(server: Server, *, num_rounds: int) -> CopyCoefficients:
    """Seconds that moves between the instances take, by the number of tokens that they copy."""
    moves = await Moves(server).alone(_MOVED_CONTEXTS, num_rounds)
    seconds = [statistics.median(move.total_s for move in moves[c]) for c in _MOVED_CONTEXTS]
    token_s = max(0.0, (seconds[1] - seconds[0]) / (_MOVED_CONTEXTS[1] - _MOVED_CONTEXTS[0]))
    # Of two stages each has its own.
    return CopyCoefficients(
        base_s=max(0.0, seconds[0] - token_s * _MOVED_CONTEXTS[0]) / 2, token_s=token_s
    )


class _Served:
    """Requests that start together, as many on each instance."""

    def __init__(self, session: aiohttp.ClientSession, server: Server, num_instances: int) -> None:
        self._session = session
        self._server = server
        self._num_instances = num_instances
        self._num_prompts = 1_000_000

    async def batch(self, contexts: Sequence[int], *, on_one: bool = False) -> MeasuredStep:
        """The mean step while requests with these contexts decode on each instance, or on one,
        and the others have nothing to do after a first token."""
        num_tokens = _NUM_TOKENS + 2 * len(contexts)
        streams, tasks = self._start(contexts, num_tokens, elsewhere=1 if on_one else num_tokens)
        await asyncio.gather(*tasks)
        num_loaded = 1 if on_one else self._num_instances
        if on_one:
            streams = streams[:: self._num_instances]
        all_decode_s = max(stream.times_s[_FIRST_GAPS] for stream in streams)
        until_s = min(stream.times_s[-1] for stream in streams)
        steps, num_kv_tokens = [], 0.0
        of_streams = (context for context in contexts for _ in range(num_loaded))
        for stream, context in zip(streams, of_streams, strict=True):
            inside = [i for i, t in enumerate(stream.times_s) if all_decode_s <= t <= until_s]
            if len(inside) < 2:
                raise RuntimeError("requests that came together did not decode together")
            first, last = inside[0], inside[-1]
            steps.append((stream.times_s[last] - stream.times_s[first]) / (last - first))
            num_kv_tokens += context + (first + last) / 2
        num_kv_tokens /= num_loaded
        return MeasuredStep(
            num_prefill_tokens=0,
            num_pairs=0,
            num_decodes=len(contexts),
            num_kv_tokens=round(num_kv_tokens),
            num_skew_tokens=len(contexts) * max(contexts) - sum(contexts),
            seconds=statistics.mean(steps),
        )

    async def prompt(self, num_tokens: int) -> MeasuredStep:
        """The step of a prompt that is alone on its instance, with all that is around it."""
        streams, tasks = self._start([num_tokens], 2)
        await asyncio.gather(*tasks)
        seconds = statistics.mean(stream.times_s[0] - stream.asked_s for stream in streams)
        return _prompt_step([num_tokens], 0, 0, seconds)

    async def prompt_beside_decodes(self, num_tokens: int, num_decodes: int) -> float:
        """Seconds of a prompt on the second of two instances, while requests decode on the first.

        A request of one token, on the other instance, goes before each: they take turns.
        """
        async with self._decoding_on_first(num_decodes):
            await self._ask(_CONTEXTS[0], 1)[1]
            stream, task = self._ask(num_tokens, 2)
            await task
        return stream.times_s[0] - stream.asked_s

    async def batch_beside_prompts(self, num_decodes: int, prompts: Sequence[int]) -> float:
        """The median step of requests that decode on the first of two instances, while the second
        computes these prompts."""
        async with self._decoding_on_first(num_decodes) as streams:
            asked = []
            began_s = time.perf_counter()
            for num_tokens in prompts:
                # By turns: a request of one token takes the first one's.
                asked.append(self._ask(_CONTEXTS[0], 1))
                await asyncio.sleep(_APART_S)
                asked.append(self._ask(num_tokens, 1))
                await asyncio.sleep(_APART_S)
            await asyncio.gather(*(task for _, task in asked))
            until_s = max(stream.times_s[0] for stream, _ in asked[1::2])
        gaps_s = [
            gap_s
            for stream in streams
            for end_s, gap_s in stream.gaps_s()
            if began_s < end_s - gap_s and end_s < until_s
        ]
        return statistics.median(gaps_s)

    @asynccontextmanager
    async def _decoding_on_first(self, num_decodes: int) -> AsyncIterator[list[Stream]]:
        """So many requests that have begun to decode on the first of two instances."""
        streams: list[Stream] = []
        tasks = []
        try:
            for _ in range(num_decodes):
                stream, task = self._ask(_CONTEXTS[0], _DECODED_BESIDE)
                streams.append(stream)
                tasks.append(task)
                await stream.reach(1)
                await self._ask(_CONTEXTS[0], 1)[1]
            for stream in streams:
                await stream.reach(8)
            yield streams
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(_ABORTED_AFTER_S)

    async def joined(self, num_decodes: int, prompts: Sequence[int]) -> list[MeasuredStep]:
        """The step in which prompts are computed beside so many requests that decode.

        Nothing if in every attempt they came in more than one step.
        """
        context = _CONTEXTS[0]
        for _ in range(_ATTEMPTS):
            streams, tasks = self._start([context] * num_decodes, _DECODED_BESIDE)
            try:
                for stream in streams:
                    await stream.reach(8)
                joining, joining_tasks = self._start(prompts, 4)
                await asyncio.gather(*joining_tasks)
                began_s = min(stream.asked_s for stream in joining)
                until_s = max(stream.times_s[0] for stream in joining)
                for stream in streams:
                    await stream.reach(sum(t <= until_s for t in stream.times_s) + 1)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await asyncio.sleep(_ABORTED_AFTER_S)
            long_steps = [_long_steps(stream, began_s, until_s) for stream in streams]
            if all(len(found) == 1 for found in long_steps):
                seconds = float(np.median([found[0] for found in long_steps]))
                num_kv_tokens = num_decodes * (context + 8)
                return [_prompt_step(prompts, num_decodes, num_kv_tokens, seconds)]
        return []

    def _start(
        self, contexts: Sequence[int], num_tokens: int, *, elsewhere: int | None = None
    ) -> tuple[list[Stream], list[asyncio.Task[None]]]:
        """Every context once for each instance, in turn.

        Args:
            elsewhere: tokens of the answers of all instances but the first, for which requests
                come one after another; none is the same, and all at once.
        """
        streams: list[Stream] = []
        tasks: list[asyncio.Task[None]] = []
        apart_s = 0.0 if elsewhere is None else _APART_S
        for context, instance in itertools.product(contexts, range(self._num_instances)):
            asked = num_tokens if elsewhere is None or instance == 0 else elsewhere
            stream, task = self._ask(context, asked, after_s=apart_s * len(streams))
            streams.append(stream)
            tasks.append(task)
        return streams, tasks

    def _ask(
        self, context: int, num_tokens: int, *, after_s: float = 0.0
    ) -> tuple[Stream, asyncio.Task[None]]:
        self._num_prompts += 1
        prompt = prompt_of(self._num_prompts, context)
        stream = Stream()

        async def ask() -> None:
            await asyncio.sleep(after_s)
            await read(self._session, self._server, prompt, stream, num_tokens)

        return stream, asyncio.create_task(ask())


def _long_steps(stream: Stream, began_s: float, until_s: float) -> list[float]:
    """The steps between the two moments that took longer than those before."""
    before = statistics.median(gap_s for end_s, gap_s in stream.gaps_s()[2:] if end_s < began_s)
    return [
        gap_s
        for end_s, gap_s in stream.gaps_s()
        if began_s < end_s and end_s - gap_s < until_s and gap_s > _LONG_STEP * before
    ]


def _prompt_step(
    prompts: Sequence[int], num_decodes: int, num_kv_tokens: int, seconds: float
) -> MeasuredStep:
    return MeasuredStep(
        num_prefill_tokens=sum(prompts),
        num_pairs=sum(n * (n + 1) // 2 for n in prompts),
        num_decodes=num_decodes,
        num_kv_tokens=num_kv_tokens,
        num_skew_tokens=0,
        seconds=seconds,
    )
