"""The scheduler's side of a live migration, on stock vLLM: export at the source, import at
the destination.

To the destination a migrated request is a preempted request that resumes with its KV intact:
blocks are reserved for it, filled by the migrator, and ``scheduler.add_request`` then finds it
with ``num_computed_tokens`` set. The stock scheduler does the rest.

Every method runs on the engine's loop thread (``LlumschedEngineCore.call``). Invariants:

- A block that is being copied is pinned (its reference count is raised), so it is neither
  reused nor freed under the copy, whatever becomes of the request.
- A suspended request is in ``scheduler.requests`` but in no queue: no instance decodes it.
- Every export and import ends in exactly one of ``release``/``resume`` and
  ``commit``/``cancel``; afterwards the block pool holds nothing on its behalf.

What this does not know: messages, transports, time-outs, and the protocol's states.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, UtilityOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.serial_utils import UtilityResult

from llumsched.core.policy import MigrationCandidate
from llumsched.core.types import priority_class
from llumsched.engine.base import CannotMigrate
from llumsched.engine.vllm.core import LlumschedEngineCore
from llumsched.engine.vllm.hints import predicted_output_tokens
from llumsched.engine.vllm.kv import KVBlocks
from llumsched.engine.vllm.state import (
    FinalState,
    RequestState,
    capture_request,
    decode_request,
    install_request,
    read_generator_state,
    why_engine_cannot_migrate,
    why_not_migratable,
)

# ``call_id`` of the message by which a destination tells the frontend that a request's outputs
# come from it from now on. vLLM draws its own ids from 64 random bits, all of them positive.
HAND_OVER_CALL_ID = -20240610

# Blocks reserved beyond the request's own tokens, so that what it decodes while being copied
# rarely needs more room at the last stage.
RESERVED_GROWTH_BLOCKS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyableBlocks:
    """Block ids of an export, from the request's first block on, pinned until it ends."""

    block_ids: list[int]
    num_preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspendedRequest:
    """A request that no step touches: its last state and all its blocks, the tail included.

    ``suspended_at_s`` is ``time.perf_counter()`` when its last step here was over.
    """

    final: FinalState
    blocks: CopyableBlocks
    suspended_at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Blocks held for a request that is arriving: of ``block_ids``, the first
    ``num_cached_blocks`` have their content already (by prefix caching). ``grammar`` is to be
    waited for before the commit, if one is being compiled."""

    request_id: str
    block_ids: list[int]
    num_cached_blocks: int
    grammar: Future[Any] | None


@dataclass(slots=True)
class _Export:
    request: Request
    num_preemptions: int
    pinned: list[KVCacheBlock] = field(default_factory=list)
    suspended: Future[SuspendedRequest] | None = None
    is_lost: bool = False


@dataclass(slots=True)
class _Import:
    request: Request
    core_request: EngineCoreRequest
    num_moves: int
    num_reserved_tokens: int


@dataclass(frozen=True, slots=True)
class _Arrival:
    num_moves: int
    at_s: float


class MigrationPort:
    """Exports and imports of one engine. ``on_lost`` hears of exports whose request finished
    (``"finished"``), was aborted (``"aborted"``) or preempted (``"preempted"``);
    ``on_release`` of requests that have left for good."""

    def __init__(self, engine: LlumschedEngineCore) -> None:
        self._engine = engine
        self._scheduler = engine.scheduler
        self._kv_manager = engine.scheduler.kv_cache_manager
        self._block_size: int = engine.vllm_config.cache_config.block_size
        self._exports: dict[str, _Export] = {}
        self._imports: dict[str, _Import] = {}
        self._moved_here: WeakKeyDictionary[Request, _Arrival] = WeakKeyDictionary()
        self.on_lost: Callable[[str, str], None] = lambda _request_id, _what: None
        self.on_release: Callable[[str], None] = lambda _request_id: None
        self.refusal = why_engine_cannot_migrate(
            engine.vllm_config, self._kv_manager.kv_cache_config
        )
        self.kv = self._open_kv_cache() if self.refusal is None else None

    def _open_kv_cache(self) -> KVBlocks | None:
        runner = self._engine.model_executor.driver_worker.worker.model_runner
        try:
            return KVBlocks(runner.kv_caches, self._kv_manager.kv_cache_config.num_blocks)
        except ValueError as error:
            self.refusal = str(error)
            return None

    # ---- source ---------------------------------------------------------------------------

    def candidates(self) -> list[MigrationCandidate]:
        """Running requests that could move now."""
        now_s = time.monotonic()
        return [
            MigrationCandidate(
                request_id=request.request_id,
                num_blocks=self._num_blocks(request.num_tokens),
                num_output_tokens=request.num_output_tokens,
                execution_priority=priority_class(request.priority),
                predicted_output_tokens=predicted_output_tokens(request.sampling_params),
                since_migration_s=(
                    now_s - self._moved_here[request].at_s if request in self._moved_here else None
                ),
            )
            for request in self._scheduler.running
            if request.request_id not in self._exports and why_not_migratable(request) is None
        ]

    def start_export(self, request_id: str) -> RequestState:
        """Begin to move a running request away; what the destination needs to reserve room.

        Raises:
            CannotMigrate: with the reason.
        """
        if self.refusal is not None:
            raise CannotMigrate(self.refusal)
        request = self._scheduler.requests.get(request_id)
        if request is None:
            raise CannotMigrate("the request has finished or is not on this instance")
        if request_id in self._exports:
            raise CannotMigrate("the request is being migrated already")
        reason = why_not_migratable(request)
        if reason is not None:
            raise CannotMigrate(reason)
        arrival = self._moved_here.get(request)
        num_moves = arrival.num_moves if arrival is not None else 0
        state = capture_request(request, num_moves=num_moves + 1)
        self._exports[request_id] = _Export(request, request.num_preemptions)
        return state

    def pin_copyable(self, request_id: str) -> CopyableBlocks:
        """Pin the blocks of the request that are full and that no step will write again."""
        export = self._exports[request_id]
        request = export.request
        if self._why_lost(export) is None:
            num_final_tokens = request.num_computed_tokens - request.num_in_flight_tokens
            self._pin(export, num_final_tokens // self._block_size)
        return self._copyable(export)

    def suspend(self, request_id: str) -> Future[SuspendedRequest]:
        """Take the request out of the batch; the future resolves when no step of it is in
        flight any more. It fails with ``CannotMigrate`` if the request ends first."""
        export = self._exports[request_id]
        future: Future[SuspendedRequest] = Future()
        request = export.request
        if self._why_lost(export) is not None or request.status != RequestStatus.RUNNING:
            future.set_exception(CannotMigrate("the request is not running any more"))
            return future
        self._scheduler.running.remove(request)
        export.suspended = future
        self._settle_suspension(export)
        return future

    def resume(self, request_id: str) -> None:
        """End an export: the request, if it still lives, goes on here with its KV intact."""
        export = self._exports.pop(request_id, None)
        if export is None:
            return
        self._unpin(export)
        request = export.request
        was_suspended = export.suspended is not None
        if not was_suspended or self._scheduler.requests.get(request_id) is not request:
            return
        if len(self._scheduler.running) < self._scheduler.max_num_running_reqs:
            self._scheduler.running.append(request)
            return
        # The batch is full: it waits like a preempted request, but keeps its blocks.
        self._scheduler.prev_step_scheduled_req_ids.discard(request_id)
        request.status = RequestStatus.PREEMPTED
        self._scheduler.kv_holding_waiting.add_request(request)

    def release(self, request_id: str) -> None:
        """End an export: the destination runs the request now, so forget it without output."""
        export = self._exports.pop(request_id, None)
        if export is None:
            return
        self._unpin(export)
        if self._scheduler.requests.get(request_id) is export.request:
            self.on_release(request_id)
            self._scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    # ---- destination ----------------------------------------------------------------------

    def reserve(self, state: RequestState) -> Reservation:
        """Reserve blocks for a request that is about to move here.

        Raises:
            CannotMigrate: with the reason; nothing is held then.
        """
        if self.refusal is not None:
            raise CannotMigrate(self.refusal)
        core_request = decode_request(state)
        request_id = core_request.request_id
        if request_id in self._scheduler.requests or request_id in self._imports:
            raise CannotMigrate("the destination holds a request of this id already")
        request, _ = self._engine.preprocess_add_request(core_request)
        request.append_output_token_ids(state.output_token_ids)
        request.num_preemptions = state.num_preemptions
        num_reserved_tokens = min(
            self._num_blocks(request.num_tokens) * self._block_size
            + RESERVED_GROWTH_BLOCKS * self._block_size,
            self._scheduler.max_model_len,
        )
        cached_blocks, num_cached_tokens, _ = self._kv_manager.get_computed_blocks(request)
        allocated = self._kv_manager.allocate_slots(
            request,
            0,
            num_new_computed_tokens=num_cached_tokens,
            new_computed_blocks=cached_blocks,
            num_external_computed_tokens=num_reserved_tokens - num_cached_tokens,
            delay_cache_blocks=True,
            skip_zeroing_group_ids=(0,),
            has_scheduled_reqs=False,
        )
        if allocated is None:
            raise CannotMigrate(
                f"the destination has {self._kv_manager.block_pool.get_num_free_blocks()} free "
                f"blocks, the request needs {self._num_blocks(num_reserved_tokens)}"
            )
        request.num_computed_tokens = num_reserved_tokens
        self._imports[request_id] = _Import(
            request, core_request, state.num_moves, num_reserved_tokens
        )
        structured = request.structured_output_request
        grammar = structured._grammar if structured is not None else None
        return Reservation(
            request_id=request_id,
            block_ids=list(self._kv_manager.get_block_ids(request_id)[0]),
            num_cached_blocks=num_cached_tokens // self._block_size,
            grammar=grammar if isinstance(grammar, Future) else None,
        )

    def grow(self, request_id: str, num_blocks: int) -> list[int]:
        """Reserve until the request holds ``num_blocks`` blocks; the ids of all of them.

        Raises:
            CannotMigrate: if there is no room to grow. The reservation stays, to be cancelled.
        """
        imported = self._imports.get(request_id)
        if imported is None:
            raise CannotMigrate("the reservation is gone")
        missing_tokens = num_blocks * self._block_size - imported.num_reserved_tokens
        if missing_tokens > 0:
            if self._scheduler.needs_kv_cache_zeroing:
                raise CannotMigrate("the request outgrew its reservation")
            if (
                self._kv_manager.allocate_slots(
                    imported.request, missing_tokens, delay_cache_blocks=True
                )
                is None
            ):
                raise CannotMigrate("the destination ran out of blocks while the request grew")
            imported.num_reserved_tokens += missing_tokens
            imported.request.num_computed_tokens = imported.num_reserved_tokens
        return list(self._kv_manager.get_block_ids(request_id)[0])

    def commit(self, request_id: str, final: FinalState) -> None:
        """Start to decode the request here; its next output comes from this instance."""
        imported = self._imports.pop(request_id, None)
        if imported is None:
            raise CannotMigrate("the reservation is gone")
        try:
            self._install(imported, final)
        except Exception:
            self._kv_manager.free(imported.request)
            raise
        self._moved_here[imported.request] = _Arrival(imported.num_moves, time.monotonic())
        self._announce(imported.request, imported.num_moves)
        self._engine.add_request(imported.request)
        imported.request.events.clear()  # it was queued once already, as the frontend knows

    def _install(self, imported: _Import, final: FinalState) -> None:
        """Make scheduler and worker believe that the request was preempted here a moment ago."""
        request = imported.request
        request.append_output_token_ids(final.output_token_ids[request.num_output_tokens :])
        request.num_computed_tokens = final.num_computed_tokens
        structured = request.structured_output_request
        if structured is not None and not self._engine.structured_output_manager.accept_tokens(
            request, final.output_token_ids
        ):
            raise CannotMigrate("the grammar refuses the tokens generated so far")
        self._kv_manager.cache_blocks(request, request.num_computed_tokens)
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
        # If it ran here before, the worker may not have been told yet that it left: it must not
        # drop the state that was just installed.
        self._scheduler.finished_req_ids.discard(request.request_id)

    def cancel(self, request_id: str) -> None:
        """Give a reservation back."""
        imported = self._imports.pop(request_id, None)
        if imported is not None:
            self._kv_manager.free(imported.request)

    # ---- observers ------------------------------------------------------------------------

    def after_step(self) -> None:
        """Notice what the step did to requests that are being exported."""
        for request_id, export in list(self._exports.items()):
            lost = self._why_lost(export)
            if lost is not None:
                self._lose(request_id, export, lost)
            else:
                self._settle_suspension(export)

    def on_abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            export = self._exports.get(request_id)
            if export is not None:
                self._lose(request_id, export, "aborted")

    # ---- helpers --------------------------------------------------------------------------

    def _why_lost(self, export: _Export) -> str | None:
        request = export.request
        if self._scheduler.requests.get(request.request_id) is not request:
            return "finished"
        if request.num_preemptions != export.num_preemptions:
            # What was copied may now lie beyond what is computed.
            return "preempted"
        return None

    def _settle_suspension(self, export: _Export) -> None:
        future, request = export.suspended, export.request
        if future is None or future.done() or request.num_in_flight_tokens > 0:
            return
        if request.num_computed_tokens != request.num_tokens - 1:
            future.set_exception(CannotMigrate("the request is not between two decode steps"))
            return
        generator_state = self._engine.collective_rpc(
            read_generator_state, args=(request.request_id,)
        )[0]
        self._pin(export, self._num_blocks(request.num_computed_tokens))
        future.set_result(
            SuspendedRequest(
                final=FinalState(
                    output_token_ids=list(request.output_token_ids),
                    num_computed_tokens=request.num_computed_tokens,
                    generator_state=generator_state,
                ),
                blocks=self._copyable(export),
                suspended_at_s=time.perf_counter(),
            )
        )

    def _lose(self, request_id: str, export: _Export, what: str) -> None:
        """Tell, once, what became of an export's request."""
        if export.is_lost:
            return
        export.is_lost = True
        if export.suspended is not None and not export.suspended.done():
            export.suspended.set_exception(CannotMigrate(f"the request was {what}"))
        self.on_lost(request_id, what)

    def _pin(self, export: _Export, num_blocks: int) -> None:
        blocks = self._kv_manager.get_blocks(export.request.request_id).blocks[0]
        new = list(blocks[len(export.pinned) : num_blocks])
        self._kv_manager.block_pool.touch(new)
        export.pinned.extend(new)

    @staticmethod
    def _copyable(export: _Export) -> CopyableBlocks:
        return CopyableBlocks(
            block_ids=[block.block_id for block in export.pinned],
            num_preemptions=export.request.num_preemptions,
        )

    def _unpin(self, export: _Export) -> None:
        # The tail is evicted first, as when a request's own blocks are freed.
        self._kv_manager.block_pool.free_blocks(reversed(export.pinned))
        export.pinned.clear()

    def _announce(self, request: Request, num_moves: int) -> None:
        announcement = UtilityOutput(
            call_id=HAND_OVER_CALL_ID,
            result=UtilityResult([request.request_id, num_moves, request.num_output_tokens]),
        )
        self._engine.output_queue.put_nowait(
            (request.client_index, EngineCoreOutputs(utility_output=announcement))
        )

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
