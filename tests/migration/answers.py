"""Comparing answers: tokens and texts must be equal, logprobs to ``TOLERANCE``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from vllm.outputs import RequestOutput

TOLERANCE = 1e-3


def seen_by_client(output: RequestOutput) -> dict[str, Any]:
    """All that a client may see of an answer but its id, with floats that compare to
    ``TOLERANCE``."""
    return {
        "prompt_token_ids": output.prompt_token_ids,
        "prompt_logprobs": _logprobs(output.prompt_logprobs),
        "choices": [
            {
                "text": choice.text,
                "token_ids": list(choice.token_ids),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                "logprobs": _logprobs(choice.logprobs),
            }
            for choice in sorted(output.outputs, key=lambda choice: choice.index)
        ],
    }


def _logprobs(positions: Sequence[Mapping[int, Any] | None] | None) -> list[Any] | None:
    if positions is None:
        return None
    return [
        None
        if position is None
        else {
            token_id: (pytest.approx(logprob.logprob, abs=TOLERANCE), logprob.decoded_token)
            for token_id, logprob in position.items()
        }
        for position in positions
    ]
