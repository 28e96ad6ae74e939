"""Prediction of a request's length, carried from scheduler to instance in the request itself.

vLLM hands ``SamplingParams.extra_args`` through untouched, and they move with the request, so a
prediction reaches whichever instance runs it without a message of its own.
"""

from __future__ import annotations

from vllm.sampling_params import SamplingParams

PREDICTED_OUTPUT_TOKENS = "llumsched_predicted_output_tokens"


def predict(sampling: SamplingParams, num_output_tokens: int) -> None:
    """Let the request's instance know its expected output length."""
    # The caller's own dictionary stays as it is.
    sampling.extra_args = {
        **(sampling.extra_args or {}),
        PREDICTED_OUTPUT_TOKENS: num_output_tokens,
    }


def predicted_output_tokens(sampling: SamplingParams | None) -> int | None:
    """Answer of ``predict``, if there was one."""
    if sampling is None or not sampling.extra_args:
        return None
    predicted = sampling.extra_args.get(PREDICTED_OUTPUT_TOKENS)
    return predicted if type(predicted) is int else None
