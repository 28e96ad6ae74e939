"""Requests on their way out of an engine: taken off its scheduler, their blocks pinned.

Invariants:

- A block that is being copied is pinned (its reference count is raised), so it is neither
  reused nor freed under the copy, whatever becomes of the request.
- A suspended request is in ``scheduler.requests`` but in no queue: no instance decodes it. One
  without KV (it waits, was preempted, or has only begun to compute its prompt) is suspended from
  the start of its export.
- Every export ends in exactly one of ``release`` and ``resume``; afterwards the block pool holds
  nothing on its behalf.
- Of a request that has ended, what the prefix cache has is pinned, and nothing is suspended.
- To model runner V2 a suspended request is a preempted one: it holds no slot of the batch, which
  others may be given. It comes back as it would from a preemption, on either runner.

What this does not know: messages, transports, time-outs, and the protocol's states.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import msgspec
from vllm.v1.request import Request, RequestStatus

from llumsched.core.policy import MigrationCandidate
from llumsched.core.types import priority_class
from llumsched.engine.base import (
    CannotMigrate,
    CopyableBlocks,
    FinalState,
    Refusal,
    RequestState,
    SuspendedRequest,
)
from llumsched.engine.vllm.core import LlumschedEngineCore
from llumsched.engine.vllm.migration.connectors import look_up, why_connector_keeps, why_no_kv
from llumsched.engine.vllm.migration.ended import EndedRequests, prefix_state, why_prefixes_stay
from llumsched.engine.vllm.migration.groups import PinnedBlocks
from llumsched.engine.vllm.migration.port import EngineAdapter
from llumsched.engine.vllm.migration.speculation import draft_statistics
from llumsched.engine.vllm.migration.state import (
    capture_request,
    read_generator_state,
    why_not_migratable,
)
from llumsched.engine.vllm.predicted_length import predicted_output_tokens

# A prompt of which less than this share is computed begins anew at the destination; beyond, its
# migration waits for the first token.
RESTART_SHARE = 0.25

# A request that could not move is no candidate for this long; twice as long each time.
REST_AFTER_REFUSAL_S = 1.0
MAX_REST_S = 60.0


@dataclass(slots=True)
class _Export:
    request: Request
    num_preemptions: int
    pinned: PinnedBlocks
    has_kv: bool = True
    suspended: Future[SuspendedRequest] | None = None
    is_lost: bool = False
    prefix: Future[RequestState] | None = None
    """Of a request that has ended: resolves with ``state`` when ``fence_step`` is over."""
    state: RequestState | None = None
    fence_step: int = 0


@dataclass(frozen=True, slots=True)
class _Rest:
    """After a refusal: no candidate before ``until_s`` (``time.monotonic()``)."""

    num_refusals: int
    until_s: float


class SourceAdapter(EngineAdapter):
    """Exports of one engine. ``on_lost`` hears of exports whose request finished
    (``"finished"``), was aborted (``"aborted"``) or preempted (``"preempted"``);
    ``on_release`` of requests that have left for good."""

    def __init__(self, engine: LlumschedEngineCore) -> None:
        super().__init__(engine)
        self._exports: dict[str, _Export] = {}
        self._rests: WeakKeyDictionary[Request, _Rest] = WeakKeyDictionary()
        self._awaited: list[tuple[Request, int, Future[None]]] = []
        self._rolled_back: list[Request] = []
        self._ended = EndedRequests(
            self.groups[0].block_size * self._kv_manager.block_pool.num_gpu_blocks
        )
        engine.observe(on_add=self._ended.add)
        self.on_lost: Callable[[str, str], None] = lambda _request_id, _what: None
        self.on_release: Callable[[str], None] = lambda _request_id: None

    def candidates(self) -> list[MigrationCandidate]:
        """Requests that could move now: they decode, and none was refused a moment ago."""
        now_s = time.monotonic()
        return [
            MigrationCandidate(
                request_id=request.request_id,
                num_blocks=self._num_blocks(request.num_tokens),
                num_output_tokens=request.num_output_tokens,
                execution_priority=priority_class(request.priority),
                predicted_output_tokens=predicted_output_tokens(request.sampling_params),
                since_migration_s=(
                    now_s - self._arrivals[request].at_s if request in self._arrivals else None
                ),
            )
            for request in self._scheduler.running
            if request.num_output_tokens > 0
            and request.request_id not in self._exports
            and self._why_not(request) is None
            and not self._is_computed_again(request)
            and not self._rests_now(request, now_s)
        ]

    def rest(self, request_id: str, refusal: Refusal) -> None:
        """A migration of the request was refused or given up: it is no candidate for a while."""
        request = self._scheduler.requests.get(request_id)
        if request is None:
            return
        before = self._rests.get(request)
        num_refusals = before.num_refusals + 1 if before is not None else 1
        rest_s = min(MAX_REST_S, REST_AFTER_REFUSAL_S * 2 ** (num_refusals - 1))
        if refusal.is_permanent:
            rest_s = math.inf
        self._rests[request] = _Rest(num_refusals, time.monotonic() + rest_s)

    def _rests_now(self, request: Request, now_s: float) -> bool:
        rest = self._rests.get(request)
        return rest is not None and now_s < rest.until_s

    def start_export(self, request_id: str) -> RequestState:
        """Begin to move a request away; what the destination needs to reserve room.

        Raises:
            CannotMigrate: with the reason. ``Refusal.PREFILLING``: it can after its first token.
        """
        request = self._exportable(request_id)
        has_kv = self._check_moment(request)
        arrival = self._arrivals.get(request)
        placement_number = arrival.placement_number if arrival is not None else 0
        state = capture_request(
            request,
            reasoning_ended=self._reasoning_ended_at_arrival.get(request),
            placement_number=placement_number + 1,
            has_kv=has_kv,
            step_time_s=self._engine.step_time_s,
        )
        if not has_kv:
            self._take_back(request)
            # Taking a running one back counts as a preemption, which must not end this export.
            state = msgspec.structs.replace(state, num_preemptions=request.num_preemptions)
        pinned = PinnedBlocks(self._kv_manager, request, request.num_tokens - 1)
        self._exports[request_id] = _Export(request, request.num_preemptions, pinned, has_kv)
        return state

    def start_prefix_export(self, request_id: str) -> Future[RequestState]:
        """Pin what is cached of a request that has ended; resolves when no step writes to it.

        Raises:
            CannotMigrate: with the reason; nothing is pinned then.
        """
        for reason, refusal in (
            (self.refusal, Refusal.UNSUPPORTED_ENGINE),
            (why_prefixes_stay(self._kv_manager), Refusal.UNSUPPORTED_ENGINE),
            (why_no_kv(self._scheduler), Refusal.KV_CONNECTOR),
        ):
            if reason is not None:
                raise CannotMigrate(reason, refusal)
        if request_id in self._exports:
            raise CannotMigrate("the request is being migrated already", Refusal.BEING_MIGRATED)
        if request_id in self._scheduler.requests:
            raise CannotMigrate("the request has not ended")
        request = self._ended.find(request_id)
        cached, num_tokens, *_ = self._kv_manager.get_computed_blocks(request)
        if not num_tokens:
            raise CannotMigrate("nothing of the request is cached any more", Refusal.NOT_HERE)
        state = prefix_state(request, num_tokens)
        pinned = PinnedBlocks(self._kv_manager, request, num_tokens)
        pinned.pin_cached(cached.blocks, num_tokens)
        # A hit may be a block whose content is only being computed, for another request.
        prefix: Future[RequestState] = Future()
        export = self._exports[request_id] = _Export(
            request,
            request.num_preemptions,
            pinned,
            prefix=prefix,
            state=state,
            fence_step=self._scheduler.sched_step_seq,
        )
        self._settle_prefix(export)
        return prefix

    def _check_moment(self, request: Request) -> bool:
        """True if the request takes KV along; raises if it cannot move at this moment."""
        if request in self._rolled_back:
            raise CannotMigrate("the request's last migration is not over", Refusal.BEING_MIGRATED)
        if request.status == RequestStatus.RUNNING:
            if request.num_output_tokens > 0:
                if self._is_computed_again(request):
                    raise CannotMigrate("the request is being computed again after a preemption")
                return True
            if request.num_computed_tokens < RESTART_SHARE * request.num_prompt_tokens:
                return False
            raise CannotMigrate("the request is still computing its prompt", Refusal.PREFILLING)
        if request.num_computed_tokens == 0 and request in self._scheduler.waiting:
            return False
        raise CannotMigrate(f"the request is about to be scheduled ({request.status.name.lower()})")

    @staticmethod
    def _is_computed_again(request: Request) -> bool:
        """True if a preempted request has not caught up with its outputs yet.

        Blocks of a prefix are shared from when the step that computes them begins. So what counts
        as computed may have no content yet; the first token after that step shows that it has.
        """
        num_computed_tokens: int = request.num_computed_tokens - request.num_in_flight_tokens
        return num_computed_tokens < request.num_tokens - 1

    def _take_back(self, request: Request) -> None:
        """Take a request without KV out of every queue; what little it has computed is dropped."""
        if request.status == RequestStatus.RUNNING:
            self._scheduler.running.remove(request)
            self._scheduler._preempt_request(request, time.monotonic())
        self._scheduler.waiting.remove_request(request)
        self._scheduler.deferred_waiting.discard(request)

    def _exportable(self, request_id: str) -> Request:
        if self.refusal is not None:
            raise CannotMigrate(self.refusal, Refusal.UNSUPPORTED_ENGINE)
        request = self._scheduler.requests.get(request_id)
        # A connector may hold a finished one until its blocks are sent or stored.
        if request is None or request.is_finished():
            raise CannotMigrate(
                "the request has finished or is not on this instance", Refusal.NOT_HERE
            )
        if request_id in self._exports:
            raise CannotMigrate("the request is being migrated already", Refusal.BEING_MIGRATED)
        refused = self._why_not(request)
        if refused is not None:
            raise refused
        return request

    def _why_not(self, request: Request) -> CannotMigrate | None:
        reason = why_connector_keeps(self._scheduler, request)
        if reason is None and request.num_computed_tokens > 0:
            reason = why_no_kv(self._scheduler)
        if reason is not None:
            return CannotMigrate(reason, Refusal.KV_CONNECTOR)
        return why_not_migratable(request)

    def await_output(self, request_id: str, num_tokens: int) -> Future[None]:
        """Resolves when the request has so many output tokens, or is gone."""
        future: Future[None] = Future()
        request = self._scheduler.requests.get(request_id)
        if request is None:
            future.set_result(None)
        else:
            self._awaited.append((request, num_tokens, future))
            self._settle_awaited()
        return future

    def pin_copyable(self, request_id: str) -> CopyableBlocks:
        """Pin the blocks of the request that are full and that no step will write again."""
        export = self._exports[request_id]
        request = export.request
        if export.prefix is None and self._why_lost(export) is None:
            export.pinned.pin_full(request.num_computed_tokens - request.num_in_flight_tokens)
        return self._copyable(export)

    def suspend(self, request_id: str) -> Future[SuspendedRequest]:
        """Take the request out of the batch; the future resolves when no step of it is in
        flight any more. It fails with ``CannotMigrate`` if the request ends first."""
        export = self._exports[request_id]
        future: Future[SuspendedRequest] = Future()
        request = export.request
        if export.prefix is not None:
            future.set_result(self._suspended(export, [], export.pinned.num_tokens, None))
            return future
        if self._why_lost(export) is not None:
            future.set_exception(CannotMigrate("the request is not here any more"))
            return future
        if export.has_kv:
            if request.status != RequestStatus.RUNNING:
                future.set_exception(CannotMigrate("the request is not running any more"))
                return future
            self._scheduler.running.remove(request)
            request.spec_token_ids = []  # guesses at what comes next; others are made for each step
            self.places.keep(request_id)
            if self._scheduler.use_v2_model_runner:
                self._scheduler.reset_preempted_req_ids.add(request_id)
        export.suspended = future
        self._settle_suspension(export)
        return future

    def resume(self, request_id: str) -> None:
        """End an export: the request, if it still lives, goes on here with its KV intact.

        It is in the next step, or where steps of it are in flight, in the one after they are over.
        """
        export = self._exports.pop(request_id, None)
        if export is None:
            return
        export.pinned.unpin()
        request = export.request
        if export.prefix is not None:
            return
        if not export.has_kv:
            if self._scheduler.requests.get(request_id) is request:
                # It was among the first to be scheduled, or has waited longer than those behind.
                self._scheduler.waiting.prepend_request(request)
        elif export.suspended is not None:
            self._rolled_back.append(request)
            self._settle_rolled_back()

    def _settle_rolled_back(self) -> None:
        """Queue what was suspended like a preempted request, but with its blocks.

        The scheduler takes it up by its own rules, of adapters as well. While a step of it is in
        flight it stays out: the scheduler would count the tokens of that step again.
        """
        settling, self._rolled_back = self._rolled_back, []
        for request in settling:
            request_id = request.request_id
            if self._scheduler.requests.get(request_id) is not request or request.is_finished():
                self.places.give_back(request_id)
            elif request.num_in_flight_tokens > 0:
                self._rolled_back.append(request)
            else:
                self._scheduler.prev_step_scheduled_req_ids.discard(request_id)
                request.status = RequestStatus.PREEMPTED
                look_up(self._scheduler, request)
                self._scheduler.kv_holding_waiting.add_request(request)
                self.places.give_back(request_id)

    def release(self, request_id: str) -> None:
        """End an export: the destination runs the request now, so forget it without output."""
        export = self._exports.pop(request_id, None)
        if export is None:
            return
        export.pinned.unpin()
        self.places.give_back(request_id)
        if self._scheduler.requests.get(request_id) is export.request:
            self.on_release(request_id)
            self._scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    # ---- observers ------------------------------------------------------------------------

    def after_step(self) -> None:
        """Notice what the step did to requests that are being exported, or soon will be."""
        if self._awaited:
            self._settle_awaited()
        if self._rolled_back:
            self._settle_rolled_back()
        for request_id, export in list(self._exports.items()):
            if export.prefix is not None:
                self._settle_prefix(export)
                continue
            lost = self._why_lost(export)
            if lost is not None:
                self._lose(request_id, export, lost)
            else:
                self._settle_suspension(export)

    def on_abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            export = self._exports.get(request_id)
            if export is not None and export.prefix is None:
                self._lose(request_id, export, "aborted")

    def _settle_awaited(self) -> None:
        awaited, self._awaited = self._awaited, []
        for request, num_tokens, future in awaited:
            if request.num_output_tokens >= num_tokens or request.is_finished():
                if not future.done():
                    future.set_result(None)
            elif not future.cancelled():
                self._awaited.append((request, num_tokens, future))

    # ---- helpers --------------------------------------------------------------------------

    def _why_lost(self, export: _Export) -> str | None:
        request = export.request
        if self._scheduler.requests.get(request.request_id) is not request or request.is_finished():
            return "finished"
        if request.num_preemptions != export.num_preemptions:
            # What was copied may now lie beyond what is computed.
            return "preempted"
        return None

    def _settle_suspension(self, export: _Export) -> None:
        future, request = export.suspended, export.request
        if future is None or future.done() or request.num_in_flight_tokens > 0:
            return
        num_expected_tokens = request.num_tokens - 1 if export.has_kv else 0
        if request.num_computed_tokens != num_expected_tokens:
            future.set_exception(CannotMigrate("the request is not between two decode steps"))
            return
        # All workers sample the same, so one speaks for them.
        generator_state = self._engine.collective_rpc(
            read_generator_state, args=(request.request_id,)
        )[0]
        if export.has_kv:
            export.pinned.pin_all(request.num_computed_tokens)
        outputs = list(request.output_token_ids)
        future.set_result(
            self._suspended(export, outputs, request.num_computed_tokens, generator_state)
        )

    def _suspended(
        self,
        export: _Export,
        output_token_ids: list[int],
        num_computed_tokens: int,
        generator_state: bytes | None,
    ) -> SuspendedRequest:
        final = FinalState(
            output_token_ids=output_token_ids,
            num_computed_tokens=num_computed_tokens,
            generator_state=generator_state,
            draft_statistics=draft_statistics(export.request),
        )
        return SuspendedRequest(
            final=final, blocks=self._copyable(export), suspended_at_s=time.perf_counter()
        )

    def _settle_prefix(self, export: _Export) -> None:
        future, state = export.prefix, export.state
        if future is None or state is None or future.done():
            return
        if self._scheduler.processed_step_seq >= export.fence_step:
            future.set_result(state)

    def _lose(self, request_id: str, export: _Export, what: str) -> None:
        """Tell, once, what became of an export's request."""
        if export.is_lost:
            return
        export.is_lost = True
        if export.suspended is not None and not export.suspended.done():
            export.suspended.set_exception(CannotMigrate(f"the request was {what}"))
        self.on_lost(request_id, what)

    @staticmethod
    def _copyable(export: _Export) -> CopyableBlocks:
        return CopyableBlocks(
            block_ids=export.pinned.block_ids,
            num_tokens=export.pinned.num_tokens,
            num_preemptions=export.request.num_preemptions,
        )
