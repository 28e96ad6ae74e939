"""The demo as a client: streamed chats through the ``openai`` package, with the time of each token.

Knows nothing of instances: to an OpenAI client a request that moves is a stream like any other.
"""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import openai

REQUEST_TIMEOUT_S = 300.0


@dataclass(slots=True, kw_only=True)
class Answer:
    """One answer as its client saw it. ``times_s`` and ``ends`` have an entry a token: when it
    came, and the length of the text with it."""

    request_id: str = ""
    text: str = ""
    prompt_token_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def is_complete(self) -> bool:
        return self.finish_reason in ("length", "stop")

    def gap_s(self, token: int) -> float:
        """How long the client waited for this token after the one before it."""
        return self.times_s[token] - self.times_s[token - 1]

    def step_s(self) -> float:
        """An ordinary decode step: the median of all gaps."""
        return statistics.median(self.gap_s(token) for token in range(1, self.num_tokens))

    def text_of(self, num_tokens: int) -> str:
        """The text of the first tokens."""
        return self.text[: self.ends[num_tokens - 1]] if num_tokens else ""


OnText = Callable[[Answer, str], None]
"""Called with the answer so far and the piece of text that has just come."""


class Client:
    """Talks to the server at ``url`` as any OpenAI client would."""

    def __init__(self, url: str) -> None:
        self._openai = openai.AsyncOpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=0,
            timeout=REQUEST_TIMEOUT_S,
            # The server is on loopback: no proxy leads there.
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        )
        self._model = ""

    async def __aenter__(self) -> Client:
        self._model = (await self._openai.models.list()).data[0].id
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._openai.close()

    async def chat(
        self,
        prompt: str,
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        to_the_end: bool = False,
        on_text: OnText | None = None,
    ) -> Answer:
        """Stream one chat; ``on_text`` is called with every piece as it comes.

        Args:
            to_the_end: decode ``max_tokens`` tokens even if the model would stop before.
        """
        answer = Answer()
        stream = await self._openai.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            stream=True,
            extra_body={
                "return_token_ids": True,
                "ignore_eos": to_the_end,
                "cache_salt": secrets.token_hex(8),
            },
        )
        async with stream:
            async for chunk in stream:
                answer.request_id = chunk.id
                answer.prompt_token_ids += _extra(chunk, "prompt_token_ids")
                for choice in chunk.choices:
                    piece = choice.delta.content or ""
                    token_ids = _extra(choice, "token_ids")
                    answer.text += piece
                    answer.token_ids += token_ids
                    answer.times_s += [time.perf_counter()] * len(token_ids)
                    answer.ends += [len(answer.text)] * len(token_ids)
                    answer.finish_reason = choice.finish_reason or answer.finish_reason
                    if on_text is not None:
                        on_text(answer, piece)
        return answer

    async def prefill_s(self, token_ids: list[int]) -> float:
        """Time to the first token behind ``token_ids``, none of which is in any cache."""
        started_s = time.perf_counter()
        await self._openai.completions.create(
            model=self._model,
            prompt=token_ids,
            max_tokens=1,
            temperature=0,
            extra_body={"cache_salt": secrets.token_hex(8)},
        )
        return time.perf_counter() - started_s


def _extra(part: Any, name: str) -> list[int]:
    """A list that vLLM adds to what OpenAI's API has."""
    return (part.model_extra or {}).get(name) or []
