"""Four shapes of traffic for two small engines, each a list of requests made from a seed.

Lengths are tokens. Each shape has its own bottleneck: answers of unknown length that crowd one
engine, long prompts before which short ones wait, turns that find their prefix where they were,
and urgent requests among others. Nothing here knows who serves it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks._streams import prompt_of

Lengths = Callable[[random.Random], tuple[int, int]]

BURST = 8
LONG_ANSWER_SHARE = 0.25
LONG_PROMPT_SHARE = 0.15
URGENT_SHARE = 0.2
NUM_TURNS = 4
TURN_TOKENS = 64
NUM_TURN_OUTPUT_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request: its moment in seconds from the first, prompt, and length of the answer."""

    at_s: float
    prompt: list[int]
    num_output_tokens: int
    is_urgent: bool = False


def bursts(rate_rps: float, num_requests: int, seed: int) -> list[Request]:
    """Bursts of eight at once; a quarter of the answers, which nobody can know, is long."""
    rng = random.Random(f"bursts/{seed}")
    at_s = 0.0
    requests: list[Request] = []
    while len(requests) < num_requests:
        requests += [_request(rng, seed, len(requests) + i, at_s, _skewed) for i in range(BURST)]
        at_s += rng.expovariate(rate_rps / BURST)
    return requests[:num_requests]


def long_prompts(rate_rps: float, num_requests: int, seed: int) -> list[Request]:
    """One prompt in seven takes more than half of an engine's KV cache; the others are short."""

    def lengths(rng: random.Random) -> tuple[int, int]:
        if rng.random() < LONG_PROMPT_SHARE:
            return rng.randrange(448, 609), rng.randrange(16, 49)
        return rng.randrange(16, 65), rng.randrange(16, 49)

    return _poisson(rate_rps, num_requests, seed, "long_prompts", lengths)


def priorities(rate_rps: float, num_requests: int, seed: int) -> list[Request]:
    """One request in five is urgent; the answers are as skewed as those of the bursts."""
    return _poisson(rate_rps, num_requests, seed, "priorities", _skewed, URGENT_SHARE)


def turns(rate_rps: float, num_requests: int, seed: int) -> list[Request]:
    """Conversations of four turns: each prompt is the one before it and 64 tokens more.

    A user takes as long between two turns as eight requests take to arrive, at least.
    """
    rng = random.Random(f"turns/{seed}")
    requests: list[Request] = []
    at_s, conversation = 0.0, 0
    while len(requests) < num_requests:
        words = prompt_of(_number("turns", seed, conversation), NUM_TURNS * TURN_TOKENS)
        turn_s = at_s
        for turn in range(1, NUM_TURNS + 1):
            requests.append(
                Request(
                    at_s=turn_s,
                    prompt=words[: turn * TURN_TOKENS],
                    num_output_tokens=NUM_TURN_OUTPUT_TOKENS,
                )
            )
            turn_s += (BURST + rng.expovariate(1 / BURST)) / rate_rps
        conversation += 1
        at_s += rng.expovariate(rate_rps / NUM_TURNS)
    return sorted(requests[:num_requests], key=lambda request: request.at_s)


SHAPES: dict[str, Callable[[float, int, int], list[Request]]] = {
    "bursts": bursts,
    "long prompts": long_prompts,
    "turns": turns,
    "priorities": priorities,
}


def _skewed(rng: random.Random) -> tuple[int, int]:
    if rng.random() < LONG_ANSWER_SHARE:
        return rng.randrange(32, 97), rng.randrange(160, 257)
    return rng.randrange(32, 97), rng.randrange(8, 33)


def _poisson(
    rate_rps: float,
    num_requests: int,
    seed: int,
    name: str,
    lengths: Lengths,
    urgent_share: float = 0.0,
) -> list[Request]:
    rng = random.Random(f"{name}/{seed}")

    def moments() -> Iterator[float]:
        at_s = 0.0
        while True:
            yield at_s
            at_s += rng.expovariate(rate_rps)

    return [
        _request(rng, seed, number, at_s, lengths, urgent_share)
        for number, at_s in zip(range(num_requests), moments(), strict=False)
    ]


def _request(
    rng: random.Random,
    seed: int,
    number: int,
    at_s: float,
    lengths: Lengths,
    urgent_share: float = 0.0,
) -> Request:
    num_prompt_tokens, num_output_tokens = lengths(rng)
    return Request(
        at_s=at_s,
        prompt=prompt_of(_number(lengths.__qualname__, seed, number), num_prompt_tokens),
        num_output_tokens=num_output_tokens,
        is_urgent=rng.random() < urgent_share,
    )


def _number(name: str, seed: int, number: int) -> int:
    """The number of a prompt that no other has, in one run."""
    return random.Random(f"{name}/{seed}/{number}").randrange(1 << 31)
