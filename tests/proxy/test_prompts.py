"""The proxy's view of a request: its length, and the names of its beginning."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llumsched.proxy.prompts import RequestFacts, facts_of

TEXT = "Once upon a time there was a scheduler. " * 20


def facts(**fields: Any) -> RequestFacts:
    return facts_of(json.dumps({"model": "m", **fields}).encode())


def chat(text: str = TEXT, **fields: Any) -> RequestFacts:
    return facts(messages=[{"role": "user", "content": text}], **fields)


def test_equal_beginnings_have_equal_names() -> None:
    one, other = facts(prompt=TEXT), facts(prompt=TEXT + "And more, until another block is full.")
    assert len(one.prefix_hashes) == len(TEXT) // 64
    assert other.prefix_hashes[: len(one.prefix_hashes)] == one.prefix_hashes
    assert not set(facts(prompt="x" + TEXT).prefix_hashes) & set(one.prefix_hashes)


@pytest.mark.parametrize("fields", [{"model": "other"}, {"cache_salt": "tenant"}])
def test_the_same_text_has_other_kv_for_another_model_or_salt(fields: dict[str, Any]) -> None:
    assert not set(chat(**fields).prefix_hashes) & set(chat().prefix_hashes)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f", "description": TEXT}}]},
        {"system": TEXT},
        {"system": [{"type": "text", "text": TEXT}]},
        {"instructions": TEXT},
    ],
)
def test_what_comes_before_the_messages_is_a_part_of_the_prompt(fields: dict[str, Any]) -> None:
    one, same, plain = chat("short", **fields), chat("other", **fields), chat("short")
    assert one.num_prompt_tokens > plain.num_prompt_tokens + len(TEXT) // 5
    assert one.prefix_hashes
    assert one.prefix_hashes[:-1] == same.prefix_hashes[:-1]
    assert not plain.prefix_hashes


def test_token_ids_are_counted_and_named() -> None:
    one = facts(prompt=list(range(100)))
    assert (one.num_prompt_tokens, len(one.prefix_hashes)) == (100, 6)
    assert facts(prompt=[*range(32), 7]).prefix_hashes == one.prefix_hashes[:2]
