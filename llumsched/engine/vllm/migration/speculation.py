"""Speculative decoding, as far as it concerns a move.

Drafts are guesses at the next tokens, which the next step accepts or rejects, so a suspended
request drops those it has. What steps in flight have guessed wrongly, vLLM takes off the computed
tokens when they are over, before the suspension is. At the destination the request goes on with a
step of one token without drafts, and its drafter guesses anew from the tokens: greedy answers are
equal, and sampled ones have the model's distribution, as rejection sampling has it for whatever is
guessed. Draws of a seeded generator differ, as do the guesses.

Not here: how drafts are made and verified.
"""

from __future__ import annotations

import msgspec
from vllm.config import VllmConfig
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

# Drafters that begin from tokens, or from the last step's hidden states; and those whose KV lies
# beside the model's, in the blocks that move. A drafter of one's own may keep anything.
MOVABLE_METHODS = frozenset({"ngram", "suffix", "medusa", "draft_model", "eagle", "eagle3"})
# Draws of a token without drafts, and at most as many again for each of: whether drafts are
# accepted, and what replaces the first that is not.
NUM_DRAWS_OF_A_STEP = 3


def why_drafter_cannot_migrate(vllm_config: VllmConfig) -> str | None:
    """The reason why no request can move with this way of speculative decoding, or ``None``."""
    config = vllm_config.speculative_config
    if config is None or config.method in MOVABLE_METHODS:
        return None
    return f"what drafts are made from does not move (speculative decoding by {config.method})"


def drafter_of(vllm_config: VllmConfig) -> str:
    """Name of the drafter whose KV lies beside the model's; empty if there is none."""
    config = vllm_config.speculative_config
    if config is None or not config.uses_draft_kv_cache():
        return ""
    return f"{config.method} {config.model}"


def num_draws_of_a_step(vllm_config: VllmConfig) -> int:
    """Most draws, of a number for each token of the vocabulary, that a step makes of a request."""
    return 1 if vllm_config.speculative_config is None else NUM_DRAWS_OF_A_STEP


class Padding:
    """Switches off, for a step, that vLLM pads what resumes with drafts to be rejected.

    A padded step costs nothing on a GPU. vLLM 0.32's kernels for CPUs accept some of the padding
    when they sample, and the token then follows on what nobody has said.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._is_off = False

    def switch_off(self) -> None:
        """Pad nothing until ``restore``: vLLM does not where the number of drafts may differ."""
        scheduler = self._scheduler
        num_drafts: int = scheduler.num_spec_tokens
        if num_drafts and scheduler.dynamic_sd_lookup is None:
            self._is_off = True
            scheduler.dynamic_sd_lookup = [num_drafts] * (scheduler.max_num_running_reqs + 1)

    def restore(self) -> None:
        if self._is_off:
            self._is_off = False
            self._scheduler.dynamic_sd_lookup = None


def draft_statistics(request: Request) -> bytes | None:
    """Counts of a request's drafts (``--per-request-spec-decode-metrics``)."""
    counted = request.spec_decode_metrics
    return msgspec.msgpack.encode(counted) if counted is not None else None


def restore_draft_statistics(request: Request, encoded: bytes | None) -> None:
    """Count on from where the source was."""
    counted = request.spec_decode_metrics
    if encoded is not None and counted is not None:
        request.spec_decode_metrics = msgspec.msgpack.decode(encoded, type=type(counted))
