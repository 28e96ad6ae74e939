"""Places in an engine's batch for requests on the move, and their tokens in its steps.

A request that arrives, or is rolled back, resumes as vLLM resumes a preempted one whose KV is
intact: from ``kv_holding_waiting``, after the running requests have been scheduled. Two things
could keep it waiting there for as long as it takes others to compute their prompts or answers:

- The batch is full. So a place is kept from the reservation, or the suspension, until the request
  is queued: the scheduler admits fewer others meanwhile.
- Running prompts take the whole token budget of each step. So in a step that requests wait for,
  prompts are cut (``long_prefill_token_threshold``, vLLM's own limit) to leave one token each. From
  then on such a request runs ahead of the prompts that it found there: the scheduler serves running
  requests in their order, and behind those prompts it would get no token until they are computed.

The scheduler is left to do the rest, on either model runner. To put the request among the running
ones at once would skip its check of adapters, and runner V2 has no state of it yet; to lower the
token budget would leave no token for it either.

Where vLLM holds prompts back for some steps (``prefill_schedule_interval``), what resumes passes:
one token is all that it lacks, so to the scheduler it is no prompt.

Invariant: running requests, those that resume and the places kept are no more than the batch holds.
What this does not know: blocks, and what a migration is. An adapter's place is not kept: a request
rolled back after others have taken the last one waits for its turn, as any preempted request does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from llumsched.engine.vllm.migration.speculation import Padding


class BatchPlaces:
    """Places of one scheduler's batch; on the engine's loop thread only."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._num_places: int = scheduler.max_num_active_reqs
        self._kept: set[str] = set()
        self._threshold: int | None = None
        self._resuming: list[Request] = []
        self._padding = Padding(scheduler)

    # ---- places -----------------------------------------------------------------------------

    def why_none(self, lora_id: int | None, request_id: str = "") -> str | None:
        """The reason why a request could not join the next step, or ``None``.

        Args:
            lora_id: its adapter's, if it has one.
            request_id: of a request that a place is kept for.
        """
        scheduler = self._scheduler
        num_taken = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
        num_taken += len(self._find_resuming()) + len(self._kept - {request_id})
        if num_taken >= self._num_places:
            return f"its batch of {self._num_places} requests is full"
        if lora_id is not None and scheduler.lora_config is not None:
            adapters = _adapters(scheduler.running) | _adapters(scheduler.kv_holding_waiting)
            max_adapters: int = scheduler.lora_config.max_loras
            if lora_id not in adapters and len(adapters) >= max_adapters:
                return f"its batch has {max_adapters} other adapters, and room for no more"
        return None

    def keep(self, request_id: str) -> None:
        """Keep a place for a request that is not queued: it is suspended, or about to arrive."""
        self._kept.add(request_id)
        self._limit_others()

    def give_back(self, request_id: str) -> None:
        """Keep a place no longer; nothing if there is none. The request is queued now, or gone."""
        self._kept.discard(request_id)
        self._limit_others()

    def _limit_others(self) -> None:
        self._scheduler.max_num_active_reqs = self._num_places - len(self._kept)

    # ---- tokens -----------------------------------------------------------------------------

    def before_step(self) -> None:
        """Leave a token of the step for each request that resumes in it."""
        if not self._scheduler.kv_holding_waiting:
            return
        self._padding.switch_off()
        scheduler, config = self._scheduler, self._scheduler.scheduler_config
        self._resuming = self._find_resuming()
        num_places = scheduler.max_num_active_reqs - len(scheduler.running)
        num_resuming = min(len(self._resuming), num_places)
        if num_resuming <= 0 or not config.enable_chunked_prefill:
            return
        # With one request alone vLLM has no threshold; here there are two at least.
        threshold: int = config.long_prefill_token_threshold
        num_wanted = [
            request.num_tokens_with_spec
            + request.num_output_placeholders
            - request.num_computed_tokens
            for request in scheduler.running
        ]
        if threshold > 0:
            num_wanted = [min(num, threshold) for num in num_wanted]
        budget = min(scheduler.max_num_scheduled_tokens, config.max_num_batched_tokens)
        cut = highest_cut(num_wanted, budget - num_resuming)
        if cut is not None:
            self._threshold, config.long_prefill_token_threshold = threshold, cut

    def after_step(self) -> None:
        """Let prompts be as long as before, and those that resumed run ahead of them."""
        self._padding.restore()
        if self._threshold is not None:
            config = self._scheduler.scheduler_config
            config.long_prefill_token_threshold, self._threshold = self._threshold, None
        resumed, self._resuming = self._resuming, []
        for request in resumed:
            self._put_ahead(request)

    def _put_ahead(self, request: Request) -> None:
        running = self._scheduler.running
        if request not in running:
            return  # it had to wait, or has finished
        index = next((i for i, other in enumerate(running) if other.is_prefill_chunk), None)
        if index is not None and index < running.index(request):
            running.remove(request)
            running.insert(index, request)

    def _find_resuming(self) -> list[Request]:
        """Requests that need one token to go on."""
        return [
            request
            for request in self._scheduler.kv_holding_waiting
            if request.status == RequestStatus.PREEMPTED
            and request.num_computed_tokens == request.num_tokens - 1
        ]


def highest_cut(num_wanted: Sequence[int], num_tokens: int) -> int | None:
    """The most tokens that each of some requests may have, for all to fit into a step.

    Args:
        num_wanted: tokens that each could be given.
        num_tokens: tokens of the step that they may have together.

    Returns:
        1 at least, as vLLM gives a running request one token; ``None`` if nothing has to be cut.
    """
    wanted = sorted(num for num in num_wanted if num > 0)
    if sum(wanted) <= num_tokens:
        return None
    for index, num in enumerate(wanted):
        share = num_tokens // (len(wanted) - index)
        if num > share:
            return max(1, share)
        num_tokens -= num
    return None


def _adapters(requests: Iterable[Request]) -> set[int]:
    return {
        request.lora_request.lora_int_id for request in requests if request.lora_request is not None
    }
