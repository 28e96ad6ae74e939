"""The control run of exactness: greedy answers alone and in one batch, on plain vLLM, unmoved.

A request that moves is in another batch afterwards. In bfloat16 that alone can change a token, as
the sums of a step depend on how many requests it has; so no migration can keep what a batch does
not. In float32 they agree, and there a moved answer is held to be equal.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Literal

from benchmarks._streams import prompt_of
from scripts.prepare_model import prepare_model

Dtype = Literal["bfloat16", "float32"]
DTYPES: tuple[Dtype, ...] = ("bfloat16", "float32")
NUM_ANSWERS = 8
NUM_PROMPT_TOKENS = 40
NUM_TOKENS = 64
BOOT_AND_ANSWER_TIMEOUT_S = 300.0


def measure() -> dict[str, int]:
    """By dtype, how many of ``NUM_ANSWERS`` answers differ between alone and in a batch."""
    model = prepare_model()
    context = multiprocessing.get_context("spawn")
    found: dict[str, int] = {}
    for dtype in DTYPES:
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
            counting = pool.submit(_count_differing, model, dtype)
            found[dtype] = counting.result(BOOT_AND_ANSWER_TIMEOUT_S)
    return found


def _count_differing(model: str, dtype: Dtype) -> int:
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams, TokensPrompt

    engine = LLM(
        model,
        dtype=dtype,
        enforce_eager=True,
        block_size=32,
        max_model_len=512,
        kv_cache_memory_bytes=1 << 28,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    prompts = [
        TokensPrompt(prompt_token_ids=prompt_of(number, NUM_PROMPT_TOKENS))
        for number in range(NUM_ANSWERS)
    ]

    def answers(asked: list[TokensPrompt]) -> list[list[int]]:
        outputs = engine.generate(asked, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    alone = [answers([prompt])[0] for prompt in prompts]
    return sum(a != b for a, b in zip(alone, answers(prompts), strict=True))
