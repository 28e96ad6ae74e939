"""The fitted step-time model.

    step = base + prefill_token * prompt tokens in the step + running * running requests
         + prefill_pair * attention pairs of the prompts + kv_token * tokens of context

The form and the default coefficients are those of the evaluation in Llumnix (OSDI '24): LLaMA-7B on
an A10. Where an instance has reported the duration of a step, the report replaces the model's own
idea of it. A prompt of n tokens, computed in chunks beside the decodes, then takes about
n * (prefill_token + step / tokens per step), and a step for its last chunk.

This module does not know deadlines, nor columns (`cluster` keeps them).
"""

from dataclasses import dataclass

import msgspec


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimeModel:
    """Coefficients, in seconds."""

    base_s: float = 0.0432
    prefill_token_s: float = 0.000203
    running_s: float = 0.00027
    prefill_pair_s: float = 0.0
    """Of a pair of a prompt token and a token it attends to; 0 unless it is learned."""
    kv_token_s: float = 0.0
    """Of a token of context of a running request; 0 unless it is learned."""


DEFAULT_STEP_TIME = StepTimeModel()


class MeasuredStep(msgspec.Struct, frozen=True, kw_only=True):
    """One step that an engine was measured to take: its batch, and its duration in seconds."""

    num_prefill_tokens: int
    num_pairs: int
    """Pairs of a prompt token and a token it attends to."""
    num_decodes: int
    num_kv_tokens: int
    """Context of all decodes."""
    num_skew_tokens: int
    """By how much the contexts of the decodes are shorter than the longest, summed."""
    seconds: float
