"""State that a request takes along when it moves: everything its next token depends on.

The KV cache travels apart, block by block; this is the rest, as one value on the wire. The
detokenizer, stop strings, ``n`` and the statistics live in the frontend and stay there.
A request whose next token depends on anything not listed here is refused with a reason
(``why_not_migratable``) rather than moved and corrupted. The state of a grammar does not travel: it
is the outcome of the tokens, and is made again from them (``replay_grammar``).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from llumsched.engine.base import (
    MAX_STATE_NUM_BYTES,
    CannotMigrate,
    FinalState,
    Refusal,
    RequestState,
)
from llumsched.engine.vllm.migration.groups import why_groups_cannot_move
from llumsched.engine.vllm.migration.speculation import why_drafter_cannot_migrate


def why_engine_cannot_migrate(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> str | None:
    """The reason why no request of this engine can move, or ``None``."""
    parallel = vllm_config.parallel_config
    if parallel.world_size > parallel.tensor_parallel_size:
        return "the instance's workers are not the shards of one model (tensor parallelism) alone"
    if parallel.decode_context_parallel_size > 1:
        return "the tokens of a block are spread over workers (decode context parallelism)"
    if parallel.world_size > 1 and parallel.distributed_executor_backend != "mp":
        return "the instance's workers may be on other hosts; --distributed-executor-backend mp"
    drafter = why_drafter_cannot_migrate(vllm_config)
    if drafter is not None:
        return drafter
    if vllm_config.model_config.enable_sleep_mode:
        return "the KV cache of a sleeping instance is not there to be copied (--enable-sleep-mode)"
    if vllm_config.model_config.is_diffusion:
        return "a diffusion model has no state between two tokens (it computes many at once)"
    if vllm_config.aux_output_config.enabled:
        return (
            "the experts of steps at the source would be missing from what is returned "
            "(--enable-return-routed-experts)"
        )
    cache = vllm_config.cache_config
    if cache.use_replayssm or cache.use_kda_recoverssm:
        return "inputs since the last whole state are kept beside it (--use-replayssm)"
    return why_groups_cannot_move(kv_cache_config)


def why_not_migratable(request: Request) -> CannotMigrate | None:
    """Reason in the request itself why it cannot move, or ``None``."""
    if request.pooling_params is not None:
        return CannotMigrate("pooling requests finish in one step", Refusal.POOLING)
    if request.resumable:
        return CannotMigrate(
            "a streaming-input session stays where it began", Refusal.STREAMING_INPUT
        )
    if any(feature.data is None for feature in request.mm_features):
        return CannotMigrate(
            "an image or other input of it is only in a cache of its engine", Refusal.MULTIMODAL
        )
    if request.prompt_embeds is not None:
        return CannotMigrate("prompt embeddings are not carried", Refusal.PROMPT_EMBEDS)
    return None


def capture_request(
    request: Request,
    *,
    reasoning_ended: bool | None,
    placement_number: int,
    has_kv: bool,
    step_time_s: float,
) -> RequestState:
    """The wire form of a request; refused kinds must have been ruled out before.

    Args:
        reasoning_ended: as it was when the request arrived. The destination finds the present
            value when it replays the outputs.
        step_time_s: the engine's recent step time.
    """
    structured = request.structured_output_request
    core_request = EngineCoreRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        mm_features=request.mm_features or None,
        sampling_params=request.sampling_params,
        pooling_params=None,
        arrival_time=request.arrival_time,
        lora_request=request.lora_request,
        cache_salt=request.cache_salt,
        data_parallel_rank=None,
        client_index=request.client_index,
        priority=request.priority,
        trace_headers=request.trace_headers,
        session_id=request.session_id,
        reasoning_ended=reasoning_ended,
        reasoning_parser_kwargs=(
            structured.reasoning_parser_kwargs if structured is not None else None
        ),
        kv_hints=request.kv_hints,
    )
    encoded = encode_request(core_request)
    if len(encoded) > MAX_STATE_NUM_BYTES:
        raise CannotMigrate(
            f"its images and other inputs are of {len(encoded) >> 20} MiB, and "
            f"{MAX_STATE_NUM_BYTES >> 20} MiB is the most that moves",
            Refusal.MULTIMODAL,
        )
    return RequestState(
        request=encoded,
        output_token_ids=list(request.output_token_ids),
        num_preemptions=request.num_preemptions,
        placement_number=placement_number,
        has_kv=has_kv,
        step_time_s=step_time_s,
    )


def encode_request(core_request: EngineCoreRequest) -> bytes:
    """Encode by vLLM's encoder, without pickle; tensors of images and other inputs in line.

    Raises:
        ValueError: if a tensor is not in this process' memory.
    """
    frames = MsgpackEncoder(size_threshold=sys.maxsize).encode(core_request)
    if len(frames) != 1 or not isinstance(frames[0], bytes):
        raise ValueError(f"Request {core_request.request_id} carries tensors of a device.")
    return frames[0]


def decode_request(state: RequestState) -> EngineCoreRequest:
    """The ``EngineCoreRequest`` inside ``state``; raises ``msgspec.DecodeError`` if malformed."""
    decoded: EngineCoreRequest = MsgpackDecoder(EngineCoreRequest).decode(state.request)
    return decoded


def why_no_grammar(manager: StructuredOutputManager, core_request: EngineCoreRequest) -> str | None:
    """The reason why an engine cannot make the request's grammar, or ``None``.

    The first request with a grammar decides on the backend of all that follow. vLLM 0.32 lets it
    make the others' grammars too, which may allow other tokens than they did at the source.
    """
    sampling = core_request.sampling_params
    outputs = sampling.structured_outputs if sampling is not None else None
    if outputs is None or outputs._backend is None or manager.backend is None:
        return None
    used = type(manager.backend).__name__.removesuffix("Backend").lower()
    if outputs._backend.replace("-", "") == used:
        return None
    return f"the destination makes grammars with {used}, the request needs {outputs._backend}"


def replay_grammar(
    manager: StructuredOutputManager, request: Request, core_request: EngineCoreRequest
) -> None:
    """Bring the grammar of an arriving request to where its outputs have brought it.

    One token after the other, as they were sampled: the grammar begins only where the reasoning,
    if there is any, has ended, and that is known by what came before each token.

    Raises:
        CannotMigrate: if the grammar does not accept the outputs.
    """
    if request.structured_output_request is None:
        return
    replayed = Request.from_engine_core_request(core_request, None)
    replayed.structured_output_request = request.structured_output_request
    for token_id in request.output_token_ids:
        replayed.append_output_token_ids(token_id)
        if not manager.accept_tokens(replayed, [token_id]):
            raise CannotMigrate("the grammar refuses the tokens generated so far")


# ---- run inside a worker, through the executor's collective_rpc -----------------------------


def read_generator_state(worker: Any, request_id: str) -> bytes | None:
    """The state of the request's random generator on this worker; ``None`` without a seed.

    Model runner V2 hashes seed and position for every token and keeps no generator.
    """
    if worker.use_v2_model_runner:
        return None
    cached = worker.model_runner.requests.get(request_id)
    if cached is None or cached.generator is None:
        return None
    return bytes(cached.generator.get_state().numpy())


def install_request(
    worker: Any,
    core_request: EngineCoreRequest,
    block_ids: tuple[list[int], ...],
    final: FinalState,
) -> None:
    """Give model runner V1 the cached state it would have if it had run the request so far.

    Model runner V2 gets the same with the request's next scheduling and needs nothing here.
    """
    if worker.use_v2_model_runner:
        return
    runner = worker.model_runner
    generator = None
    if final.generator_state is not None:
        generator = torch.Generator(device=runner.device)
        generator.set_state(torch.frombuffer(bytearray(final.generator_state), dtype=torch.uint8))
    cached = runner.requests[core_request.request_id] = CachedRequestState(
        req_id=core_request.request_id,
        prompt_token_ids=core_request.prompt_token_ids,
        mm_features=core_request.mm_features or [],
        sampling_params=core_request.sampling_params,
        pooling_params=None,
        generator=generator,
        block_ids=block_ids,
        num_computed_tokens=final.num_computed_tokens,
        output_token_ids=list(final.output_token_ids),
        lora_request=core_request.lora_request,
    )
    if runner.uses_mrope:
        runner._init_mrope_positions(cached)
