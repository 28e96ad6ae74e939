"""A reasoning parser for the tests: where reasoning ends, and where it never was.

vLLM's own parsers want tokens that the model of the tests does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser

NAME = "of_the_tests"
START, END = "<jupyter_code>", "<jupyter_output>"
START_ID, END_ID = 13, 14


class Parser(BaseThinkingReasoningParser):
    """As those of models that reason if their chat template says so: with ``thinking``."""

    def __init__(self, tokenizer: Any, *args: Any, thinking: bool = False, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self._thinking = thinking

    @property
    def start_token(self) -> str:
        return START

    @property
    def end_token(self) -> str:
        return END

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        return not self._thinking or super().is_reasoning_end(input_ids)


ReasoningParserManager.register_module(NAME, module=Parser)
