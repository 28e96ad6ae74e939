"""A request of the fake engine, what travels when it moves, and how its tokens come about.

Invariant: a token is a function of the tokens before it and of how many were sampled, so that
``expected_output`` knows the output of any request that was not disturbed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import msgspec

from llumsched.engine.base import RequestState, SuspendedRequest

VOCABULARY_SIZE = 50_000


class SentRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as its client sent it: what a ``RequestState`` has in ``request``."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_output_tokens: int


def state_of(
    sent: SentRequest,
    output_token_ids: Sequence[int],
    *,
    placement_number: int,
    num_preemptions: int = 0,
) -> RequestState:
    """The request as it travels before its KV does."""
    return RequestState(
        request=msgspec.msgpack.encode(sent),
        output_token_ids=list(output_token_ids),
        num_preemptions=num_preemptions,
        placement_number=placement_number,
    )


def sent_request(state: RequestState) -> SentRequest:
    """The request inside ``state``."""
    return msgspec.msgpack.decode(state.request, type=SentRequest)


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
    placement_number: int = 0
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    num_steps_in_flight: int = 0
    num_preemptions: int = 0
    generator_state: int = 1
    block_ids: list[int] = field(default_factory=list)

    @property
    def output_token_ids(self) -> tuple[int, ...]:
        return tuple(self.token_ids[self.num_prompt_tokens :])


@dataclass(slots=True)
class ScheduledRequest:
    """Tokens of a request that a step computes."""

    request: FakeRequest
    num_preemptions: int
    first_position: int
    num_tokens: int


@dataclass(slots=True)
class Export:
    """A request on its way out: every block that it holds on the migration's behalf."""

    request: FakeRequest
    num_preemptions: int
    pinned: list[int] = field(default_factory=list)
    num_tokens: int = 0
    suspended: Future[SuspendedRequest] | None = None
    is_lost: bool = False


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
