"""The same traffic before several contestants, in turn, and what each client saw.

A contestant is anything that serves an OpenAI API on two engines of the same flags. Capacity is
measured on the machine at hand: what the first contestant serves a second while all requests of a
shape wait at once, on servers of its own that end before the contest begins: whoever ran it would
have learnt from it. Memory is the limit, not compute: 26 blocks of 32 tokens an engine, for at most
16 sequences.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks._servers import ENGINE_FLAGS, Server, llumsched
from benchmarks._shapes import SHAPES, Request
from benchmarks._streams import Stream, clients, read
from llumsched.flags import Parser

NUM_BLOCKS = 26
BLOCK_SIZE = 32
FLAGS = (
    *ENGINE_FLAGS,
    "--max-model-len",
    str(NUM_BLOCKS * BLOCK_SIZE),
    # vLLM keeps a block that no request may have.
    "--num-gpu-blocks-override",
    str(NUM_BLOCKS + 1),
    "--max-num-seqs",
    "16",
    "--max-num-batched-tokens",
    "256",
    "--scheduling-policy",
    "priority",
)
METRICS = ("TTFT mean", "TTFT P99", "TPOT P99", "longest gap P99")
URGENT = "urgent TTFT P99"
NUM_WARM_UP, NUM_AT_ONCE = 4, 60
# Of the prompts that are not measured: no seed of a contest is as large.
_SALT = 1_000
NORMAL_PRIORITY = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A contestant that serves.

    ``engines`` are the URLs of vLLM's own metrics, ``engine_pids`` the processes that compute.
    """

    server: Server
    engines: tuple[str, ...]
    engine_pids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A name, and how it is started."""

    name: str
    start: Callable[[], AbstractContextManager[Running]]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Cell:
    """A shape at a share of the capacity, from a seed."""

    shape: str
    load: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Parts that a contest consists of."""

    shapes: Sequence[str]
    loads: Sequence[float]
    num_seeds: int
    num_requests: int


@dataclass(slots=True, kw_only=True)
class Outcome:
    """All that was measured: seconds by cell, contestant and metric, and preemptions."""

    plan: Plan
    names: list[str]
    capacity_rps: dict[str, float] = field(default_factory=dict)
    seconds: dict[Cell, dict[str, dict[str, float]]] = field(default_factory=dict)
    num_preemptions: dict[Cell, dict[str, float]] = field(default_factory=dict)

    def ratios(
        self, shape: str, load: float, metric: str, name: str, other: str
    ) -> tuple[float, float, float]:
        """Median, least and largest over the seeds of one contestant's figure over another's."""
        found = [
            by_name[name][metric] / by_name[other][metric]
            for cell, by_name in self.seconds.items()
            if (cell.shape, cell.load) == (shape, load)
        ]
        return statistics.median(found), min(found), max(found)

    def median_s(self, shape: str, load: float, metric: str, name: str) -> float:
        """The median over the seeds."""
        return statistics.median(
            by_name[name][metric]
            for cell, by_name in self.seconds.items()
            if (cell.shape, cell.load) == (shape, load)
        )


def options(shapes: Sequence[str], loads: Sequence[float]) -> Callable[[Parser], None]:
    """Flags by which a part of a contest can be run: a whole one takes hours on two cores."""

    def add(parser: Parser) -> None:
        parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(shapes))
        parser.add_argument("--loads", nargs="+", type=float, default=list(loads))
        parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
        parser.add_argument("--requests", type=int, default=200, help="a cell (default: 200)")

    return add


def plan_of(arguments: argparse.Namespace) -> Plan:
    """The plan that the flags ask for; a quick one is one cell of a few requests."""
    if arguments.quick:
        return Plan(shapes=["bursts"], loads=[0.95], num_seeds=1, num_requests=24)
    return Plan(
        shapes=arguments.shapes,
        loads=arguments.loads,
        num_seeds=arguments.seeds,
        num_requests=arguments.requests,
    )


def pool_contestant(name: str, config: str) -> Contestant:
    """Two instances of ours, under the configuration that the YAML says."""

    @contextmanager
    def start() -> Iterator[Running]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pool.yaml"
            path.write_text(config, encoding="utf-8")
            with llumsched(2, (*FLAGS, "--config", str(path))) as server:
                with urllib.request.urlopen(f"{server.url}/llumsched/instances") as response:
                    berths = json.load(response)["berths"]
                pids = tuple(berth["pid"] for berth in berths)
                yield Running(server=server, engines=(server.url,), engine_pids=pids)

    return Contestant(name=name, start=start)


def contest(plan: Plan, contestants: Sequence[Contestant]) -> Outcome:
    """Every contestant serves every cell; those of a seed one soon after another.

    Raises:
        RuntimeError: an answer has not as many tokens as was asked for.
    """
    outcome = Outcome(plan=plan, names=[c.name for c in contestants])
    with contestants[0].start() as running:
        _warm_up(running.server, 0)
        for shape in plan.shapes:
            num_at_once = min(NUM_AT_ONCE, plan.num_requests)
            outcome.capacity_rps[shape] = _capacity(running.server, shape, num_at_once)
    for seed in range(plan.num_seeds):
        # Whoever comes first in one round comes last in another: a machine warms up.
        turn = seed % len(contestants)
        for contestant in [*contestants[turn:], *contestants[:turn]]:
            with contestant.start() as running:
                _serve_all(plan, seed, contestant.name, running, outcome)
    return outcome


def _serve_all(plan: Plan, seed: int, name: str, running: Running, outcome: Outcome) -> None:
    server = running.server
    _warm_up(server, seed)
    for shape in plan.shapes:
        for load in plan.loads:
            cell = Cell(shape=shape, load=load, seed=seed)
            rate_rps = load * outcome.capacity_rps[shape]
            requests = SHAPES[shape](rate_rps, plan.num_requests, seed)
            before = num_preemptions(running.engines)
            streams = asyncio.run(_replay(server, requests))
            after = num_preemptions(running.engines)
            seen = _reduced(requests, streams)
            outcome.seconds.setdefault(cell, {})[name] = seen
            outcome.num_preemptions.setdefault(cell, {})[name] = after - before
            shown = ", ".join(f"{metric} {value:.2f} s" for metric, value in seen.items())
            print(f"{shape}, {load:.0%}, seed {seed}: {name}: {shown}", flush=True)


def _warm_up(server: Server, seed: int) -> None:
    asyncio.run(_replay(server, SHAPES["bursts"](100.0, NUM_WARM_UP, _SALT * (seed + 1))))


def _capacity(server: Server, shape: str, num_requests: int) -> float:
    requests = [
        Request(at_s=0.0, prompt=request.prompt, num_output_tokens=request.num_output_tokens)
        for request in SHAPES[shape](1.0, num_requests, _SALT)
    ]
    began_s = time.perf_counter()
    asyncio.run(_replay(server, requests))
    return num_requests / (time.perf_counter() - began_s)


async def _replay(server: Server, requests: Iterable[Request]) -> list[Stream]:
    async with clients() as session:
        began_s = time.perf_counter()

        async def ask(request: Request) -> Stream:
            stream = Stream()
            await asyncio.sleep(began_s + request.at_s - time.perf_counter())
            await read(
                session,
                server,
                request.prompt,
                stream,
                request.num_output_tokens,
                # vLLM serves the lower number first.
                priority=0 if request.is_urgent else NORMAL_PRIORITY,
                headers={"X-Request-Priority": "high"} if request.is_urgent else {},
            )
            if len(stream.times_s) != request.num_output_tokens:
                raise RuntimeError(
                    f"{len(stream.times_s)} tokens came, not {request.num_output_tokens}"
                )
            return stream

        return list(await asyncio.gather(*(ask(request) for request in requests)))


def _reduced(requests: Sequence[Request], streams: Sequence[Stream]) -> dict[str, float]:
    """Figures of the clients in seconds, by metric."""
    ttft = np.array([stream.times_s[0] - stream.asked_s for stream in streams])
    tpot = np.array([(s.times_s[-1] - s.times_s[0]) / max(1, len(s.times_s) - 1) for s in streams])
    gaps = np.array([max((gap for _, gap in s.gaps_s()), default=0.0) for s in streams])
    values = (ttft.mean(), *(np.percentile(column, 99) for column in (ttft, tpot, gaps)))
    seen = dict(zip(METRICS, map(float, values), strict=True))
    urgent = ttft[[request.is_urgent for request in requests]]
    if len(urgent):
        seen[URGENT] = float(np.percentile(urgent, 99))
    return seen


def num_preemptions(engines: Iterable[str]) -> float:
    """Preemptions of all engines so far, as vLLM counts them."""
    total = 0.0
    for url in engines:
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
            text = response.read().decode()
        found = re.findall(r"^vllm:num_preemptions_total(?:\{.*\})? (\S+)$", text, re.MULTILINE)
        total += sum(map(float, found))
    return total
