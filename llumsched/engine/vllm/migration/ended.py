"""Requests that have ended here, by whose tokens the prefix cache still finds their KV.

vLLM forgets a request when it ends and keeps its full blocks, by their hashes, until it needs the
room. The next turn of a conversation finds them that way; so does a move of them to another engine.

Invariant: of requests that are kept here nothing is held in the block pool. What this does not
know: which of them are turns of a session that goes on.
"""

from __future__ import annotations

from collections import OrderedDict

from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from llumsched.engine.base import CannotMigrate, Refusal, RequestState
from llumsched.engine.vllm.migration.groups import has_whole_prefixes
from llumsched.engine.vllm.migration.state import encode_request

MOST_REQUESTS = 4096


def why_prefixes_stay(kv_manager: KVCacheManager) -> str | None:
    """The reason why an engine has nothing of a request that has ended, or ``None``."""
    if not kv_manager.enable_caching:
        return "prefix caching is off, so nothing is kept of a request that has ended"
    if not has_whole_prefixes(kv_manager):
        return "of a request that has ended, windows and states are not kept whole"
    return None


def prefix_state(request: Request, num_tokens: int) -> RequestState:
    """The wire form of a request's first ``num_tokens`` tokens, all of which have KV.

    To the destination it is a request that lacks its next token, and never gets it.
    """
    core_request = EngineCoreRequest(
        request_id=request.request_id,
        prompt_token_ids=request.all_token_ids[: num_tokens + 1],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        arrival_time=request.arrival_time,
        lora_request=request.lora_request,
        cache_salt=request.cache_salt,
        data_parallel_rank=None,
        client_index=request.client_index,
        session_id=request.session_id,
    )
    return RequestState(
        request=encode_request(core_request),
        output_token_ids=[],
        num_preemptions=request.num_preemptions,
        placement_number=0,
        has_ended=True,
    )


class EndedRequests:
    """The requests that came to an engine last, as many as its cache has room for.

    Args:
        max_tokens: tokens of prompts, over all that are kept.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._requests: OrderedDict[str, Request | CannotMigrate] = OrderedDict()

    def add(self, request: Request) -> None:
        """Note a request that has come; whether it has ended is asked later."""
        self._forget(request.request_id)
        self._requests[request.request_id] = _why_not(request) or request
        self._num_tokens += _size(self._requests[request.request_id])
        while self._num_tokens > self._max_tokens or len(self._requests) > MOST_REQUESTS:
            self._forget(next(iter(self._requests)))

    def _forget(self, request_id: str) -> None:
        known = self._requests.pop(request_id, None)
        if known is not None:
            self._num_tokens -= _size(known)

    def find(self, request_id: str) -> Request:
        """The request of this id.

        Raises:
            CannotMigrate: if it is not known any more, or not of a kind whose prefix moves.
        """
        known = self._requests.get(request_id)
        if known is None:
            raise CannotMigrate("the request was not here, or too long ago", Refusal.NOT_HERE)
        if isinstance(known, CannotMigrate):
            raise known
        return known


def _why_not(request: Request) -> CannotMigrate | None:
    if request.pooling_params is not None:
        return CannotMigrate("pooling requests leave nothing to go on from", Refusal.POOLING)
    if request.mm_features:
        return CannotMigrate("images and other inputs are not kept", Refusal.MULTIMODAL)
    if request.prompt_embeds is not None:
        return CannotMigrate("prompt embeddings are not kept", Refusal.PROMPT_EMBEDS)
    if request.resumable:
        return CannotMigrate("a streaming-input session stays", Refusal.STREAMING_INPUT)
    return None


def _size(known: Request | CannotMigrate) -> int:
    return 0 if isinstance(known, CannotMigrate) else int(known.num_prompt_tokens)
