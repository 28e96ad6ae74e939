"""Facts of an OpenAI request that a scheduler needs, read from its body without a tokenizer.

A token is taken for four characters, as it is on average in English text; a prompt of token ids is
counted. The names of prefix blocks are chained hashes of the text, so equal names are equal
beginnings of prompts to the same model; they are names within this process only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llumsched.hints import session_name

BLOCK_SIZE = 16
CHARACTERS_PER_TOKEN = 4
_BLOCK_CHARACTERS = BLOCK_SIZE * CHARACTERS_PER_TOKEN
MOST_BLOCKS = 4096
"""Blocks of a prompt that are named; what follows them does not decide where it goes."""


class MalformedRequest(ValueError):
    """A body is no request of the OpenAI API; the message is for its client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFacts:
    """A request as the scheduler sees it. `model` is `None` where the body names none."""

    model: str | None
    stream: bool
    num_prompt_tokens: int
    max_output_tokens: int | None
    prefix_hashes: tuple[int, ...]
    session_id: str | None
    priority: int


def facts_of(body: bytes) -> RequestFacts:
    """Facts that a body states.

    Raises:
        MalformedRequest: not a JSON object, or a field that is read has another type.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedRequest(f"The body is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise MalformedRequest("The body must be a JSON object.")
    model = content.get("model")
    if model is not None and not isinstance(model, str):
        raise MalformedRequest("'model' must be a string.")
    limits = (content.get(name) for name in ("max_completion_tokens", "max_tokens"))
    limit = next((value for value in limits if isinstance(value, int) and value > 0), None)
    num_tokens, hashes = _prompt(content)
    if content.get("previous_response_id") or content.get("conversation"):
        # The beginning of the prompt is at the server that gave the response, and not here.
        hashes = ()
    priority = content.get("priority")
    return RequestFacts(
        model=model,
        stream=content.get("stream") is True,
        num_prompt_tokens=max(1, num_tokens),
        max_output_tokens=limit,
        prefix_hashes=hashes,
        session_id=session_name(_session(content)),
        priority=priority if isinstance(priority, int) else 0,
    )


def _session(content: Mapping[str, Any]) -> str | None:
    """The session that a body names, in one of the fields that OpenAI and others have for it."""
    metadata, conversation = content.get("metadata"), content.get("conversation")
    of = metadata if isinstance(metadata, Mapping) else {}
    named = (
        content.get("session_id"),
        content.get("prompt_cache_key"),
        conversation.get("id") if isinstance(conversation, Mapping) else conversation,
        of.get("session_id"),
        content.get("user"),
    )
    return next((name for name in named if isinstance(name, str) and name), None)


def _prompt(content: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
    prompt = content.get("prompt", content.get("input"))
    # Of the same text, KV of another model, or of another tenant's salt, is another.
    root = hash((content.get("model"), str(content.get("cache_salt"))))
    if isinstance(prompt, list) and prompt and all(isinstance(token, int) for token in prompt):
        return len(prompt), _names(root, _pieces(prompt, BLOCK_SIZE))
    # Templates put these before the messages.
    before = [content.get(name) for name in ("tools", "system", "instructions")]
    rest = content.get("messages") if prompt is None else prompt
    text = "\x00".join(_texts([*before, rest]))
    blocks = _names(root, _pieces(text, _BLOCK_CHARACTERS))
    return -(-len(text) // CHARACTERS_PER_TOKEN), blocks


def _texts(node: Any, depth: int = 0) -> Iterator[str]:
    """Every string of a prompt or of messages, in order."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, Mapping) and depth < 16:
        for value in node.values():
            yield from _texts(value, depth + 1)
    elif isinstance(node, list) and depth < 16:
        for value in node:
            yield from _texts(value, depth + 1)


def _pieces(sequence: Sequence[Any], size: int) -> Iterator[Any]:
    """Full pieces of this size, from the start."""
    for begin in range(0, min(len(sequence), MOST_BLOCKS * size) - size + 1, size):
        piece = sequence[begin : begin + size]
        yield piece if isinstance(piece, str) else tuple(piece)


def _names(root: int, pieces: Iterator[Any]) -> tuple[int, ...]:
    names: list[int] = []
    last = root
    for piece in pieces:
        last = hash((last, piece))
        names.append(last)
    return tuple(names)
