"""The rest of a stream whose server is lost, asked of another server from the text delivered.

Text is what a plain server can be given again, so the prompt of the rest is the prompt with that
text behind it, and the answer is another one than the lost server's would have been: other tokens
may make the same text, samplers begin anew, and penalties count the text as prompt. What such a
prompt cannot carry is not continued: see `delivery_of` and `Delivery.refusal`.

Invariant: the client gets whole events only, with the id, the model and the time of the first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
CONTINUES_CHAT = frozenset({"vLLM"})
"""Engines that can be told to go on with the last message of a chat (`continue_final_message`)."""
_END = re.compile(rb"\r?\n\r?\n")
_DONE = b"[DONE]"
_ALIKE = ("id", "created", "model")
_LIMITS = ("max_tokens", "max_completion_tokens", "min_tokens")
_LEFT_AS_IT_IS: dict[str, Callable[[Any], bool]] = {
    "n": lambda value: value in (None, 1),
    "best_of": lambda value: value in (None, 1),
    "tool_choice": lambda value: value in (None, "none", "auto"),
    "response_format": lambda value: value is None or value == {"type": "text"},
    "logprobs": lambda value: value is None or value is False,
    "prompt_logprobs": lambda value: value is None,
}
"""Fields with values that ask for nothing that text alone does not carry."""
_NOT_CONTINUED = (
    *("tools", "functions", "top_logprobs", "structured_outputs", "guided_json", "guided_regex"),
    *("guided_choice", "guided_grammar", "echo", "suffix", "use_beam_search", "return_token_ids"),
    *("prompt_embeds", "audio", "modalities", "kv_transfer_params"),
)
"""Fields that a request to be continued must not have, or only with an empty value."""


def delivery_of(path: str, content: Mapping[str, Any]) -> Delivery | None:
    """A record of a stream about to begin; `None` if its request cannot be continued.

    Args:
        path: of the request, without its query.
        content: its body.
    """
    if content.get("stream") is not True or any(content.get(name) for name in _NOT_CONTINUED):
        return None
    if not all(is_plain(content.get(name)) for name, is_plain in _LEFT_AS_IT_IS.items()):
        return None
    if path == COMPLETIONS and isinstance(content.get("prompt"), str):
        return Delivery(content, is_chat=False)
    if path == CHAT and isinstance(content.get("messages"), list) and content["messages"]:
        last = content["messages"][-1]
        extends = bool(content.get("continue_final_message"))
        if not extends or (isinstance(last, dict) and isinstance(last.get("content"), str)):
            return Delivery(content, is_chat=True)
    return None


class Delivery:
    """The part of a stream's answer that its client has.

    Args:
        content: body of the request.
        is_chat: if it is one of a chat.
    """

    def __init__(self, content: Mapping[str, Any], *, is_chat: bool) -> None:
        self.is_chat = is_chat
        self.is_over = False
        """The answer has a reason why it ended, or is an error."""
        self.num_tokens = 0
        """Output tokens, as the server counts them, or one an event."""
        self._content = content
        self._parts: list[str] = []
        self._told: dict[str, Any] | None = None
        self._pending = b""
        self._num_tokens_before = 0
        self._num_servers = 1
        self._oddity = ""

    @property
    def refusal(self) -> str | None:
        """Reason why the rest cannot be asked for, if there is one."""
        limits = [self._content.get(name) for name in ("max_tokens", "max_completion_tokens")]
        if self._oddity:
            return self._oddity
        if any(isinstance(limit, int) and limit <= self.num_tokens for limit in limits):
            return "no token is left of its limit"
        return None

    def body(self) -> bytes:
        """The request for the rest."""
        content = dict(self._content)
        text = "".join(self._parts)
        if not text:
            return json.dumps(content).encode()
        if self.is_chat:
            messages = list(content["messages"])
            if content.get("continue_final_message"):
                messages[-1] = {**messages[-1], "content": messages[-1]["content"] + text}
            else:
                messages.append({"role": "assistant", "content": text})
            content |= {
                "messages": messages,
                "add_generation_prompt": False,
                "continue_final_message": True,
            }
        else:
            content["prompt"] += text
        for name in _LIMITS:
            if isinstance(content.get(name), int):
                content[name] = max(0, content[name] - self.num_tokens)
        return json.dumps(content).encode()

    def another_server(self) -> None:
        """Take what is fed from now on for another server's answer to `body`."""
        self._pending = b""
        self._num_tokens_before = self.num_tokens
        self._num_servers += 1

    def feed(self, chunk: bytes) -> bytes:
        """Take in what a server sends: what the client may have of it, in whole events."""
        self._pending += chunk
        told, begin = [], 0
        for end in _END.finditer(self._pending):
            told.append(self._event(self._pending[begin : end.end()]))
            begin = end.end()
        self._pending = self._pending[begin:]
        return b"".join(told)

    def rest(self) -> bytes:
        """Bytes after the last whole event of a stream that has ended."""
        pending, self._pending = self._pending, b""
        return pending

    def _event(self, whole: bytes) -> bytes:
        """An event as the client gets it, without anything if it does not."""
        event = whole.strip()
        if not event or event.startswith(b":"):
            return whole
        name, _, data = event.partition(b":")
        if name != b"data" or b"\n" in event:
            self._oddity = "it has events of another form"
            return whole
        if data.strip() == _DONE:
            self.is_over = True
            return whole
        try:
            content = json.loads(data)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            self._oddity = "an event of it is no object"
            return whole
        if "error" in content:
            self.is_over = True
            return whole
        is_first = self._told is None
        if is_first:
            self._told = {name: content.get(name) for name in _ALIKE}
        opens = self._take_in(content)
        if self._num_servers == 1:
            return whole
        return b"" if opens and not is_first else self._as_of_the_first(content)

    def _take_in(self, content: dict[str, Any]) -> bool:
        """Note an event; true if it only opens a chat's answer."""
        choices = content.get("choices") or ()
        for choice in choices:
            piece = (choice.get("delta") or {}) if self.is_chat else choice
            text = piece.get("content" if self.is_chat else "text") or ""
            is_last = choice.get("finish_reason") is not None
            if choice.get("index") or choice.get("logprobs") is not None:
                self._oddity = "it has log probabilities, or several choices"
            if self.is_chat and any(piece[name] for name in piece.keys() - {"role", "content"}):
                self._oddity = "it has more than text"
            if self.is_chat and "role" in piece and not text and not is_last:
                return True
            self.is_over |= is_last
            self._parts.append(text)
            self.num_tokens += 1
        usage = content.get("usage")
        if choices and isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
            self.num_tokens = self._num_tokens_before + usage["completion_tokens"]
        return False

    def _as_of_the_first(self, content: dict[str, Any]) -> bytes:
        """An event of the rest, as one of the answer that it continues."""
        content |= self._told or {}
        usage = content.get("usage")
        if isinstance(usage, dict):
            for name, by in (("prompt_tokens", -1), ("completion_tokens", 1)):
                if isinstance(usage.get(name), int):
                    usage[name] += by * self._num_tokens_before
        return b"data: " + json.dumps(content).encode() + b"\n\n"
