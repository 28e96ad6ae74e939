"""Requests on their way into an engine: room held for them, then a place in its scheduler.

To the destination a migrated request is a preempted request that resumes with its KV intact:
blocks are reserved for it, filled by the migrator, and ``scheduler.add_request`` then finds it
with ``num_computed_tokens`` set. The stock scheduler does the rest. A request that comes without
KV holds no blocks, and is handed over to wait for its turn.

Invariant: every import ends in exactly one of ``commit`` and ``cancel``; afterwards the block pool
holds nothing on its behalf but what the request itself holds, and the batch no place.

Of a request that has ended the blocks alone arrive: they are cached, and nothing is queued.

What this does not know: messages, transports, time-outs, and the protocol's states.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass

from vllm.exceptions import VLLMClientError
from vllm.v1.core.sched.scheduler import PauseState
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, UtilityOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.serial_utils import UtilityResult

from llumsched.engine.base import (
    BlockTables,
    CannotMigrate,
    FinalState,
    Refusal,
    RequestState,
    ReservedBlocks,
)
from llumsched.engine.vllm.compat import rejects_new_requests, takes
from llumsched.engine.vllm.core import LlumschedEngineCore
from llumsched.engine.vllm.migration.connectors import blocks_being_read, look_up, why_no_kv
from llumsched.engine.vllm.migration.ended import why_prefixes_stay
from llumsched.engine.vllm.migration.groups import ArrivingBlocks
from llumsched.engine.vllm.migration.port import Arrival, EngineAdapter
from llumsched.engine.vllm.migration.speculation import restore_draft_statistics
from llumsched.engine.vllm.migration.state import (
    decode_request,
    install_request,
    replay_grammar,
    why_no_grammar,
)

# ``call_id`` of the message by which a destination tells the frontend that a request's outputs
# come from it from now on. vLLM draws its own ids from 64 random bits, all of them positive.
HAND_OVER_CALL_ID = -20240610

# The source asks during one step here, and the request decodes on to the end of another.
NUM_STEPS_UNTIL_HAND_OVER = 2


@dataclass(slots=True)
class _Import:
    request: Request
    core_request: EngineCoreRequest
    placement_number: int
    has_kv: bool
    has_ended: bool


class DestinationAdapter(EngineAdapter):
    """Imports of one engine."""

    def __init__(self, engine: LlumschedEngineCore) -> None:
        super().__init__(engine)
        self._imports: dict[str, _Import] = {}
        self._blocks = ArrivingBlocks(self._kv_manager)

    def reserve(self, state: RequestState, *, may_wait: bool = False) -> ReservedBlocks:
        """Reserve blocks, and a place in the batch, for a request that is about to move here.

        Args:
            may_wait: whether a paused engine takes the request too, to go on when it is resumed.

        Raises:
            CannotMigrate: with the reason; nothing is held then.
        """
        if self.refusal is not None and state.has_kv:
            raise CannotMigrate(self.refusal, Refusal.UNSUPPORTED_ENGINE)
        core_request = decode_request(state)
        if not may_wait:
            self._check_pause()
        if state.has_ended:
            stays = why_prefixes_stay(self._kv_manager)
            if stays is not None:
                raise CannotMigrate(f"at the destination, {stays}", Refusal.UNSUPPORTED_ENGINE)
        elif state.has_kv:
            self._check_place(core_request)
        if state.has_kv:
            connector = why_no_kv(self._scheduler)
            if connector is not None:
                raise CannotMigrate(connector, Refusal.KV_CONNECTOR)
        request_id = core_request.request_id
        if request_id in self._scheduler.requests or request_id in self._imports:
            raise CannotMigrate(
                "the destination holds a request of this id already", Refusal.BEING_MIGRATED
            )
        request = self._new_request(core_request)
        request.append_output_token_ids(state.output_token_ids)
        request.num_preemptions = state.num_preemptions
        num_cached_blocks = 0
        if state.has_kv:
            num_cached_blocks = self._allocate(request, state.step_time_s)
            if not state.has_ended:
                self.places.keep(request_id)
        self._imports[request_id] = _Import(
            request, core_request, state.placement_number, state.has_kv, state.has_ended
        )
        structured = request.structured_output_request
        grammar = structured._grammar if structured is not None else None
        return ReservedBlocks(
            block_ids=self._blocks.block_ids(request),
            num_cached_blocks=num_cached_blocks,
            grammar=grammar if isinstance(grammar, Future) else None,
        )

    def _new_request(self, core_request: EngineCoreRequest) -> Request:
        """Make the request as the engine does with one that a client sends."""
        reason = why_no_grammar(self._engine.structured_output_manager, core_request)
        if reason is not None:
            raise CannotMigrate(reason, Refusal.GRAMMAR_BACKEND)
        try:
            request, _ = self._engine.preprocess_add_request(core_request)
        except (ValueError, VLLMClientError) as error:
            # Nothing but the grammar of a request that was accepted elsewhere can be wrong here.
            raise CannotMigrate(
                f"the destination's engine does not take it: {error}", Refusal.GRAMMAR_BACKEND
            ) from error
        found: Request = request
        return found

    def _check_pause(self) -> None:
        is_paused = self._scheduler.pause_state != PauseState.UNPAUSED
        if is_paused or rejects_new_requests(self._engine):
            raise CannotMigrate("the destination is paused", Refusal.PAUSED)

    def _check_place(self, core_request: EngineCoreRequest) -> None:
        """Raise if the request could not be in the next step if it came now."""
        lora = core_request.lora_request
        reason = self.places.why_none(
            lora.lora_int_id if lora is not None else None, core_request.request_id
        )
        if reason is not None:
            raise CannotMigrate(f"the destination cannot take it up: {reason}", Refusal.NO_ROOM)

    def _check_frees(self) -> None:
        if not self.frees.are_fenced:
            raise CannotMigrate(
                "the destination's blocks are still written by steps from before they were reset",
                Refusal.NO_ROOM,
            )

    def _allocate(self, request: Request, token_s: float) -> int:
        """Hold blocks for an arriving request; how many of them have content already.

        Args:
            token_s: seconds a token of output at the source.
        """
        self._check_frees()
        if self._scheduler.needs_kv_cache_zeroing and not takes(
            self._kv_manager.allocate_slots, "skip_zeroing_group_ids"
        ):
            raise CannotMigrate(
                "this version of vLLM zeroes the blocks of arrivals", Refusal.UNSUPPORTED_ENGINE
            )
        num_cached_blocks = self._blocks.hold(
            request,
            self._scheduler.max_model_len,
            num_more_tokens=self._num_tokens_until_hand_over(request, token_s),
        )
        try:
            self._check_readers(request)
        except CannotMigrate:
            self._kv_manager.free(request)
            raise
        return num_cached_blocks

    def _check_readers(self, request: Request) -> None:
        """Raise if a connector still reads a block that is about to be filled."""
        held = self._kv_manager.get_blocks(request.request_id).blocks
        filled = {block.block_id for group in held for block in group if block.block_hash is None}
        if not blocks_being_read(self._scheduler).isdisjoint(filled):
            raise CannotMigrate(
                "a KV connector of the destination still reads the blocks that are free",
                Refusal.NO_ROOM,
            )

    def _num_tokens_until_hand_over(self, request: Request, token_s: float) -> int:
        """Tokens that the request puts out at its source before it is suspended: many, where a step
        here takes as long as many there."""
        if token_s <= 0:
            return 0
        step_s = self._engine.step_ahead().step_s
        num_tokens = int(NUM_STEPS_UNTIL_HAND_OVER * step_s / token_s)
        return min(num_tokens, request.max_tokens - request.num_output_tokens)

    def grow(self, request_id: str, num_tokens: int) -> BlockTables:
        """Reserve blocks for so many tokens; the ids of all that are reserved.

        Raises:
            CannotMigrate: if there is no room to grow. The reservation stays, to be cancelled.
        """
        imported = self._imports.get(request_id)
        if imported is None:
            raise CannotMigrate("the reservation is gone")
        self._check_frees()
        self._blocks.grow(imported.request, num_tokens)
        self._check_readers(imported.request)
        return self._blocks.block_ids(imported.request)

    def commit(self, request_id: str, final: FinalState) -> None:
        """Start to decode the request here; its next output comes from this instance."""
        imported = self._imports.pop(request_id, None)
        if imported is None:
            raise CannotMigrate("the reservation is gone")
        if imported.has_ended:
            self._keep_cached(imported.request, final.num_computed_tokens)
            return
        try:
            if imported.has_kv:
                self._check_pause()
                self._check_place(imported.core_request)
            self._install(imported, final)
        except Exception:
            self._free(imported)
            raise
        request = imported.request
        self._arrivals[request] = Arrival(imported.placement_number, time.monotonic())
        self._announce(request, imported.placement_number)
        self._engine.add_request(request)
        restore_draft_statistics(request, final.draft_statistics)
        if imported.has_kv:
            look_up(self._scheduler, request)
        self.places.give_back(request_id)
        self._reasoning_ended_at_arrival[request] = imported.core_request.reasoning_ended
        request.events.clear()  # it was queued once already, as the frontend knows

    def _keep_cached(self, request: Request, num_tokens: int) -> None:
        """All blocks of a request that has ended are here: leave them to the prefix cache."""
        try:
            if num_tokens != request.num_tokens - 1:
                raise CannotMigrate(f"{num_tokens} tokens came of {request.num_tokens - 1}")
            self._blocks.settle(request, num_tokens)
        finally:
            self._kv_manager.free(request)

    def _install(self, imported: _Import, final: FinalState) -> None:
        """Make scheduler and worker believe that the request was preempted here a moment ago.

        A request that has no output yet is new to the worker, and needs nothing.
        """
        request = imported.request
        request.append_output_token_ids(final.output_token_ids[request.num_output_tokens :])
        num_expected_tokens = request.num_tokens - 1 if imported.has_kv else 0
        if final.num_computed_tokens != num_expected_tokens:
            # The scheduler would die of it, and every request of this instance with it.
            raise CannotMigrate(
                f"the request came with {final.num_computed_tokens} computed tokens of "
                f"{num_expected_tokens}"
            )
        request.num_computed_tokens = final.num_computed_tokens
        if imported.has_kv:
            self._blocks.settle(request, request.num_computed_tokens)
        if not request.num_output_tokens:
            return
        replay_grammar(self._engine.structured_output_manager, request, imported.core_request)
        self._engine.collective_rpc(
            install_request,
            args=(
                imported.core_request,
                self._kv_manager.get_block_ids(request.request_id),
                final,
            ),
        )
        request.status = RequestStatus.PREEMPTED
        request.prefill_stats = None  # the prompt was computed, and counted, at the source
        self._scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
        if not self._scheduler.use_v2_model_runner:
            # If it ran here before, the worker may not have been told yet that it left: it must not
            # drop the state that was just installed. Runner V2 drops a slot before it gives one,
            # and only what is told to have left gives its slot back.
            self._scheduler.finished_req_ids.discard(request.request_id)

    def is_arriving(self, request_id: str) -> bool:
        """True if there is an import of the request."""
        return request_id in self._imports

    def cancel(self, request_id: str) -> None:
        """Give a reservation back."""
        imported = self._imports.pop(request_id, None)
        if imported is not None:
            self._free(imported)

    def _free(self, imported: _Import) -> None:
        self._kv_manager.free(imported.request)
        self.places.give_back(imported.request.request_id)

    def _announce(self, request: Request, placement_number: int) -> None:
        announcement = UtilityOutput(
            call_id=HAND_OVER_CALL_ID,
            result=UtilityResult([request.request_id, placement_number, request.num_output_tokens]),
        )
        self._engine.output_queue.put_nowait(
            (request.client_index, EngineCoreOutputs(utility_output=announcement))
        )
