"""Multi-turn chats: a turn's prompt is all that was said before, and a new message.

Chats begin as a Gamma process and share a few system prompts. Turns come at times that are fixed
in advance, so that a slow cluster meets the same load as a fast one (an open loop); a client that
waits for its answer would send later. Blocks of a chat keep their hashes from turn to turn, and the
blocks of a system prompt are the same in every chat that begins with it.
"""

from __future__ import annotations

import heapq

import numpy as np

from llumsched.simulator.traces.arrivals import gamma_arrivals
from llumsched.simulator.traces.lengths import lognormal_lengths
from llumsched.simulator.traces.trace import Trace, make_trace

_BLOCK_SIZE = 16
_SYSTEM_PROMPT_TOKENS = (64, 512, 1024, 2048)
_MEAN_TURNS = 4.0
_MEAN_THINK_S = 20.0
# Chats of an earlier time are under way when the trace begins.
_WARM_UP_S = 4 * _MEAN_TURNS * _MEAN_THINK_S
_MEDIAN_MESSAGE_TOKENS = 60.0
_MEDIAN_ANSWER_TOKENS = 200.0
_SIGMA = 0.8
_MAX_MESSAGE_TOKENS = 4096
_MAX_ANSWER_TOKENS = 1024
_MAX_PROMPT_TOKENS = 16384
# Hashes are numbers that differ; a chat owns a range of them, wide enough for any prompt.
_HASHES_OF_A_CHAT = 1 << 16


def session_trace(*, rate_rps: float, cv: float, num_requests: int, seed: int) -> Trace:
    """`num_requests` turns at about `rate_rps`, from a time when chats are in every stage.

    A client id is a chat. A chat ends early when its prompt would pass 16,384 tokens.
    """
    rng = np.random.default_rng([seed, 3])
    chat_rate_rps = rate_rps / _MEAN_TURNS
    # Every chat has a turn, so these are more than enough.
    num_chats = num_requests + int(2 * _WARM_UP_S * chat_rate_rps) + 100
    starts = gamma_arrivals(num_chats, rate_rps=chat_rate_rps, cv=cv, rng=rng)
    arrivals: list[float] = []
    prompts: list[int] = []
    outputs: list[int] = []
    clients: list[str] = []
    hashes: list[tuple[int, ...]] = []
    pending: list[float] = []
    num_settled = 0
    for chat, start_s in enumerate(starts.tolist(), start=1):
        while pending and pending[0] <= start_s:
            heapq.heappop(pending)
            num_settled += 1
        if num_settled >= num_requests:
            break  # no later chat has a turn among the first that are wanted
        system = int(rng.integers(len(_SYSTEM_PROMPT_TOKENS)))
        num_system_tokens = _SYSTEM_PROMPT_TOKENS[system]
        num_turns = int(rng.geometric(1 / _MEAN_TURNS))
        messages = lognormal_lengths(
            _MEDIAN_MESSAGE_TOKENS, _SIGMA, num_turns, rng, at_most=_MAX_MESSAGE_TOKENS
        )
        answers = lognormal_lengths(
            _MEDIAN_ANSWER_TOKENS, _SIGMA, num_turns, rng, at_most=_MAX_ANSWER_TOKENS
        )
        times = start_s + np.cumsum(rng.exponential(_MEAN_THINK_S, size=num_turns))
        context = num_system_tokens
        for when_s, message, answer in zip(
            times.tolist(), messages.tolist(), answers.tolist(), strict=True
        ):
            context += message
            if context > _MAX_PROMPT_TOKENS:
                break
            if when_s < _WARM_UP_S:
                context += answer
                continue
            arrivals.append(when_s - _WARM_UP_S)
            heapq.heappush(pending, when_s)
            prompts.append(context)
            outputs.append(answer)
            clients.append(f"chat-{chat}")
            hashes.append(_prefix_hashes(chat, system, num_system_tokens, context))
            context += answer
    trace = make_trace(
        "sessions",
        arrival_s=arrivals,
        num_prompt_tokens=prompts,
        num_output_tokens=outputs,
        client_ids=clients,
        prefix_hashes=hashes,
        hash_block_size=_BLOCK_SIZE,
        notes=(
            f"synthetic chats at {rate_rps:g} turns/s, seed {seed}",
            "turns come at fixed times, whether the answer before has ended or not",
        ),
    )
    return trace.head(num_requests)


def _prefix_hashes(
    chat: int, system: int, num_system_tokens: int, num_prompt_tokens: int
) -> tuple[int, ...]:
    """Hashes of the full blocks: first those of the system prompt, then the chat's own."""
    num_shared = num_system_tokens // _BLOCK_SIZE
    shared = range(system * _HASHES_OF_A_CHAT, system * _HASHES_OF_A_CHAT + num_shared)
    first_own = (chat + len(_SYSTEM_PROMPT_TOKENS)) * _HASHES_OF_A_CHAT
    own = range(first_own + num_shared, first_own + num_prompt_tokens // _BLOCK_SIZE)
    return (*shared, *own)
