"""Requests of every kind: each depends on something of its own that has to move with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm.sampling_params import SamplingParams, StructuredOutputsParams

NUM_TOKENS = 28
NUM_LONG_PROMPT_TOKENS = 500

STORY = "Once upon a time, in a village by the sea, there lived"
PERSON = {
    "type": "object",
    "properties": {
        name: {"type": "string", "minLength": 8, "maxLength": 24} for name in ("name", "city")
    }
    | {"age": {"type": "integer"}},
    "required": ["name", "city", "age"],
    "additionalProperties": False,
}
TOOL_CALL = {
    "type": "structural_tag",
    "format": {
        "type": "tag",
        "begin": '<tool_call name="register">',
        "content": {"type": "json_schema", "json_schema": PERSON},
        "end": "</tool_call>",
    },
}
LIST = r"""
root ::= item item item item item item item item
item ::= "- " word " " number "\n"
word ::= "apple" | "orange" | "banana" | "cherry"
number ::= [1-9] [0-9] [0-9]
"""


@dataclass(frozen=True, slots=True)
class Case:
    """``fields`` are ``InputProcessor.process_inputs``'s. With ``is_long`` the prompt has many
    blocks of its own."""

    params: SamplingParams
    fields: Mapping[str, Any] = field(default_factory=dict)
    is_long: bool = False

    def prompt(self, tokenizer: Any) -> list[int]:
        if self.is_long:
            return [504 + i * 37 % 997 for i in range(NUM_LONG_PROMPT_TOKENS)]
        ids: list[int] = tokenizer.encode(STORY)
        return ids


def params(**fields: Any) -> SamplingParams:
    """Greedy, and of exactly ``NUM_TOKENS`` tokens, but for ``fields``."""
    return SamplingParams(
        **({"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True} | fields)
    )


def guided(**fields: Any) -> SamplingParams:
    return params(
        structured_outputs=StructuredOutputsParams(**fields), ignore_eos=False, max_tokens=48
    )


CASES: dict[str, Case] = {
    "greedy": Case(params()),
    "seed": Case(params(temperature=0.9, seed=7)),
    "seed, top_p, top_k, min_p": Case(
        params(temperature=1.0, seed=11, top_p=0.9, top_k=40, min_p=0.02)
    ),
    "repetition penalty": Case(params(repetition_penalty=1.3)),
    "presence penalty": Case(params(presence_penalty=1.5)),
    "frequency penalty": Case(params(frequency_penalty=1.2)),
    "penalties, seed": Case(
        params(temperature=1.0, seed=3, repetition_penalty=1.8, frequency_penalty=1.5)
    ),
    # The first token ends the answer as soon as it may.
    "min_tokens": Case(params(min_tokens=20, logit_bias={198: 60.0}, stop_token_ids=[198])),
    "logit_bias": Case(params(logit_bias={281: 100.0, 253: 99.5})),
    "bad words": Case(params(bad_words=["and", "was", "the", "of", "a", "to", "He", "."])),
    "allowed tokens": Case(params(allowed_token_ids=list(range(300, 1300)))),
    "stop string": Case(params(stop=["lived a wise", "xyzzy", "village."])),
    "stop token": Case(params(stop_token_ids=[30, 198, 253], min_tokens=16)),
    "end of text": Case(params(ignore_eos=False, min_tokens=20, logit_bias={2: 60.0})),
    "length": Case(params(max_tokens=25)),
    "logprobs": Case(params(logprobs=3)),
    "logprobs, seed": Case(params(temperature=0.9, seed=13, logprobs=2)),
    "prompt logprobs": Case(params(prompt_logprobs=2, logprobs=1)),
    "JSON schema": Case(guided(json=PERSON)),
    "JSON object": Case(guided(json_object=True)),
    "regular expression": Case(guided(regex=r"([A-Z][a-z]{4,9} [0-9]{5}; ){6}")),
    "grammar": Case(guided(grammar=LIST)),
    "choice": Case(
        guided(choice=[f"a {colour} bird sat on the tower and sang" * 3 for colour in "gw"])
    ),
    "tool call": Case(guided(structural_tag=json.dumps(TOOL_CALL))),
    "three of one": Case(params(n=3, temperature=0.9, seed=5)),
    "cache salt": Case(params(), {"cache_salt": "of this user"}, is_long=True),
    "priority": Case(params(), {"priority": -1}),
    "long prompt": Case(params(), is_long=True),
    "long prompt, seed": Case(params(temperature=0.9, seed=2), is_long=True),
    # Of the tokens that it may choose from, half are in the prompt.
    "prompt under penalty": Case(
        params(
            temperature=1.0,
            seed=8,
            repetition_penalty=2.0,
            allowed_token_ids=list(range(504, 1501)),
        ),
        is_long=True,
    ),
    "long answer": Case(params(temperature=0.9, seed=4, max_tokens=120), is_long=True),
}
