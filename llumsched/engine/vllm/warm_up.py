"""A few requests that an engine computes before it serves, so that nothing is compiled later.

vLLM compiles parts of its sampler when they are first used, also with ``--enforce-eager``. Of two
instances one then waits for the file lock of the other, and their clients for both. The parts for
logprobs, top-k and top-p are used here, for one request and for several: a batch of one is compiled
by itself.

This module runs on the thread that builds the engine, before its loop; nothing of the requests is
left. It does not know the instance.
"""

from __future__ import annotations

import logging
import time

from vllm.config import ModelConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from llumsched.engine.vllm.core import LlumschedEngineCore

logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 2)
NUM_PROMPT_TOKENS = 3
MAX_TOKENS = 2


def warm_up(engine: LlumschedEngineCore) -> None:
    """Compute a request, and then a batch, with what samplers compile for."""
    config = engine.vllm_config.model_config
    if config.runner_type != "generate" or config.is_encoder_decoder:
        return
    for size in BATCH_SIZES:
        request_ids = [f"warm-up-{size}-{number}" for number in range(size)]
        try:
            for request_id in request_ids:
                request, _ = engine.preprocess_add_request(_request(request_id, config))
                engine.add_request(request)
            _run_to_the_end(engine)
        except Exception:
            # It may serve what its clients ask for all the same.
            logger.exception("The engine could not be warmed up")
            engine.abort_requests(request_ids)
            return


def _request(request_id: str, config: ModelConfig) -> EngineCoreRequest:
    num_logprobs = 1 if config.max_logprobs else None
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[0] * NUM_PROMPT_TOKENS,
        mm_features=None,
        sampling_params=SamplingParams(
            max_tokens=MAX_TOKENS,
            top_k=2,
            top_p=0.5,
            logprobs=num_logprobs,
            prompt_logprobs=num_logprobs,
        ),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def _run_to_the_end(engine: LlumschedEngineCore) -> None:
    while engine.has_work():
        _, model_executed = engine.step_fn()
        engine.post_step(model_executed)
