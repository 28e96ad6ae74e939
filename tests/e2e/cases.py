"""The requests that are asked of plain vLLM and of llumsched, each with a name.

All are deterministic: greedy, or sampled with a seed. All are long enough to be moved twice on
the way.
"""

from __future__ import annotations

from typing import Any

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

STORY = "Once upon a time, in a village by the sea, there lived"
QUESTION = [{"role": "user", "content": "Tell me about the moon in a few sentences."}]
NUM_TOKENS = 48

PERSON = {
    "type": "object",
    "properties": {
        name: {"type": "string", "minLength": 8, "maxLength": 24}
        for name in ("name", "city", "occupation", "hobby")
    }
    | {"age": {"type": "integer"}},
    "required": ["name", "city", "age", "occupation", "hobby"],
    "additionalProperties": False,
}


def completion(**fields: Any) -> dict[str, Any]:
    """A greedy completion of exactly ``NUM_TOKENS`` tokens, but for ``fields``."""
    body = {
        "prompt": STORY,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
    }
    return body | fields


def chat(**fields: Any) -> dict[str, Any]:
    """The same as a chat."""
    body = completion(**({"messages": QUESTION} | fields))
    del body["prompt"]
    return body


# One sequence each.
SINGLE: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (COMPLETIONS, completion()),
    "seeded": (COMPLETIONS, completion(temperature=0.9, seed=7)),
    "seeded with top_p, top_k, min_p": (
        COMPLETIONS,
        completion(temperature=1.0, seed=11, top_p=0.9, top_k=40, min_p=0.02),
    ),
    "penalties": (
        COMPLETIONS,
        completion(repetition_penalty=1.2, presence_penalty=0.6, frequency_penalty=0.4),
    ),
    "penalties, seeded": (
        COMPLETIONS,
        completion(temperature=0.8, seed=3, repetition_penalty=1.3, frequency_penalty=0.5),
    ),
    "logit bias, bad words, min_tokens": (
        COMPLETIONS,
        completion(
            logit_bias={"281": 2.0, "253": -4.0},
            bad_words=["wise", "old"],
            min_tokens=40,
            ignore_eos=False,
        ),
    ),
    "logprobs": (COMPLETIONS, completion(logprobs=3)),
    "prompt as tokens, detokenized with specials": (
        COMPLETIONS,
        completion(prompt=[504, 2416, 282, 260, 905, 314], skip_special_tokens=False),
    ),
    "stop token": (COMPLETIONS, completion(stop_token_ids=[198], ignore_eos=False)),
    "stop string": (
        COMPLETIONS,
        completion(stop=["\n\nThe", "xyzzy"], max_tokens=96, include_stop_str_in_output=True),
    ),
    "chat": (CHAT, chat()),
    "chat to its end": (CHAT, chat(ignore_eos=False, max_tokens=96)),
    "chat with logprobs": (CHAT, chat(logprobs=True, top_logprobs=2)),
    "chat with continuous usage": (
        CHAT,
        chat(stream_options={"include_usage": True, "continuous_usage_stats": True}),
    ),
    "guided by a JSON schema": (
        CHAT,
        chat(
            messages=[{"role": "user", "content": "Describe a person as JSON."}],
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "person", "schema": PERSON},
            },
            ignore_eos=False,
            max_tokens=96,
        ),
    ),
    "guided by a regular expression": (
        COMPLETIONS,
        completion(
            structured_outputs={"regex": r"([A-Z][a-z]{4,9} [0-9]{5}; ){8}"}, ignore_eos=False
        ),
    ),
    "guided by a choice": (
        COMPLETIONS,
        completion(
            structured_outputs={
                "choice": [
                    f"a {colour} bird, which sat on the highest tower of the old town and looked "
                    "down upon the people who went to the market with their baskets, their dogs "
                    "and their children, and never once sang"
                    for colour in ("green", "white")
                ]
            },
            ignore_eos=False,
        ),
    ),
}

# Several sequences each.
SEVERAL: dict[str, tuple[str, dict[str, Any]]] = {
    "three of one prompt": (COMPLETIONS, completion(n=3, temperature=0.9, seed=5, max_tokens=96)),
    "two prompts": (
        COMPLETIONS,
        completion(prompt=[STORY, "The capital of France is"], max_tokens=96),
    ),
    "chat, two of one": (CHAT, chat(n=2, temperature=0.8, seed=2, max_tokens=96)),
}

STREAMED = SINGLE | SEVERAL

# Answered in one piece: path, body (``None``: a GET). Whatever the model's name is comes with it.
WHOLE: dict[str, tuple[str, dict[str, Any] | None]] = {
    "completion": (COMPLETIONS, completion(stream_options=None)),
    "completion with echo and prompt logprobs": (
        COMPLETIONS,
        completion(stream_options=None, max_tokens=8, echo=True, logprobs=2, prompt_logprobs=1),
    ),
    "chat": (CHAT, chat(stream_options=None, logprobs=True, top_logprobs=1)),
    "chat with a tool": (
        CHAT,
        chat(
            stream_options=None,
            ignore_eos=False,
            tools=[
                {
                    "type": "function",
                    "function": {
                        "name": "describe",
                        "parameters": {
                            "type": "object",
                            "properties": {"phase": {"enum": ["new", "full"]}},
                            "required": ["phase"],
                        },
                    },
                }
            ],
            tool_choice={"type": "function", "function": {"name": "describe"}},
        ),
    ),
    "responses": (
        "/v1/responses",
        {"input": "Tell me about the sea.", "temperature": 0, "max_output_tokens": 16},
    ),
    "messages": ("/v1/messages", {"messages": QUESTION, "temperature": 0, "max_tokens": 16}),
    "models": ("/v1/models", None),
    "version": ("/version", None),
    "tokenize": ("/tokenize", {"prompt": STORY, "return_token_strs": True}),
    "tokenize a chat": ("/tokenize", {"messages": QUESTION}),
    "detokenize": ("/detokenize", {"tokens": [504, 2416, 282, 260, 905, 314]}),
}

# What plain vLLM answers with 500: found by tests/e2e/test_fuzz.py, which must know them.
BROKEN: dict[str, tuple[str, dict[str, Any]]] = {
    # Its validators ask the value for a key before they know that it is an object.
    "structured_outputs": (COMPLETIONS, {"prompt": STORY, "structured_outputs": 1}),
    # It takes the first part of an earlier answer, of which there is none.
    "an answer without content": (
        "/v1/responses",
        {
            "max_output_tokens": 4,
            "input": [
                {
                    "type": "message",
                    "id": "",
                    "role": "assistant",
                    "status": "completed",
                    "content": [],
                }
            ],
        },
    ),
}


def breaks_plain_vllm(body: Any) -> bool:
    """True if a body has one of the faults of ``BROKEN``."""
    if not isinstance(body, dict):
        return False
    inputs = body.get("input")
    return not isinstance(body.get("structured_outputs", {}), dict) or any(
        isinstance(item, dict) and item.get("role") == "assistant" and item.get("content") == []
        for item in (inputs if isinstance(inputs, list) else ())
    )


# Refused: path, body, as JSON or as it is.
REFUSED: dict[str, tuple[str, dict[str, Any] | bytes | None]] = {
    "no prompt": (COMPLETIONS, {"max_tokens": 4}),
    "no messages": (CHAT, {"max_tokens": 4}),
    "not JSON": (COMPLETIONS, b"{"),
    "negative max_tokens": (COMPLETIONS, completion(max_tokens=-1)),
    "no sequence": (COMPLETIONS, completion(n=0)),
    "greedy, but several": (COMPLETIONS, completion(n=2)),
    "temperature of the wrong type": (COMPLETIONS, completion(temperature="hot")),
    "unknown model": (COMPLETIONS, completion(model="no-such-model")),
    "prompt too long": (COMPLETIONS, completion(prompt=[504] * 1100)),
    "prompt and answer too long": (COMPLETIONS, completion(prompt=[504] * 1000)),
    "too many logprobs": (COMPLETIONS, completion(logprobs=1000)),
    "token that does not exist": (COMPLETIONS, completion(prompt=[10_000_000])),
    "grammar that is none": (COMPLETIONS, completion(structured_outputs={"regex": "("})),
}

# Plain vLLM answers these in the shape of its web framework, we in OpenAI's.
MISSED: dict[str, tuple[str, dict[str, Any] | bytes | None]] = {
    "unknown path": ("/v1/nothing", {}),
    "wrong method": (COMPLETIONS, None),
}
