"""A request of the fake engine, what travels when it moves, and how its tokens come about.

Invariant: a token is a function of the tokens before it and of how many were sampled, so that
``expected_output`` knows the output of any request that was not disturbed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

VOCABULARY_SIZE = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeState:
    """What the destination needs to reserve room."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    max_output_tokens: int
    num_preemptions: int
    num_moves: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeFinal:
    """What is known once the request is suspended."""

    output_token_ids: tuple[int, ...]
    num_computed_tokens: int
    generator_state: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeCopyableBlocks:
    block_ids: tuple[int, ...]
    num_preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeSuspendedRequest:
    final: FakeFinal
    blocks: FakeCopyableBlocks


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeReservedBlocks:
    block_ids: tuple[int, ...]
    num_cached_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeOutput:
    """One output token; ``position`` counts the request's output tokens from 0."""

    request_id: str
    position: int
    token_id: int
    finished: bool


@dataclass(slots=True, kw_only=True, eq=False)
class FakeRequest:
    """A request in the engine. ``token_ids`` are prompt and output."""

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    max_output_tokens: int
    num_moves: int = 0
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    num_steps_in_flight: int = 0
    num_preemptions: int = 0
    generator_state: int = 1
    block_ids: list[int] = field(default_factory=list)

    @property
    def output_token_ids(self) -> tuple[int, ...]:
        return tuple(self.token_ids[self.num_prompt_tokens :])


def expected_output(prompt_token_ids: Sequence[int], max_output_tokens: int) -> list[int]:
    """The output of an engine that runs the request undisturbed."""
    token_ids = list(prompt_token_ids)
    generator_state = 1
    for _ in range(max_output_tokens):
        generator_state = next_state(generator_state)
        token_ids.append(sample(token_ids, generator_state))
    return token_ids[len(prompt_token_ids) :]


def next_state(generator_state: int) -> int:
    return generator_state * 48271 % 2147483647


def sample(kv: Sequence[int], generator_state: int) -> int:
    return hash((generator_state, *kv)) % VOCABULARY_SIZE
