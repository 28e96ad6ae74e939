"""An engine for tests: real blocks, real steps, and tokens that betray any mistake in a move.

Each token is a hash of what the KV cache holds for *all* positions before it, read block by block,
and of the request's own generator. A block that was not copied, was copied too early, belongs to
another request by now, or a generator that was left behind makes the next token differ from
``expected_output``; reading a cell that nothing has written is an error at once.

Like vLLM it caches prefixes, preempts the latest request when blocks run out, and may have several
steps in flight: a step is scheduled first and takes effect when it is finished, in order.
Knows no time: a step lasts until the caller finishes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from llumsched.core.migration.groups import CacheGroup
from llumsched.core.policy import MigrationCandidate
from llumsched.engine.base import (
    BlockTables,
    CannotMigrate,
    CopyableBlocks,
    FinalState,
    KVAccess,
    Refusal,
    RequestState,
    ReservedBlocks,
    SuspendedRequest,
)
from tests.fake_engine.blocks import FakeBlockPool, FakeKVCache
from tests.fake_engine.request import (
    Export,
    FakeOutput,
    FakeRequest,
    ScheduledRequest,
    SentRequest,
    next_state,
    sample,
    sent_request,
    state_of,
)


class FakeEngine:
    """One instance's engine. It implements ``MigrationEngine``.

    Args:
        num_blocks: KV blocks of ``block_size`` tokens.
        max_steps_in_flight: 2 and more act like async scheduling.
    """

    def __init__(self, *, num_blocks: int, block_size: int, max_steps_in_flight: int = 1) -> None:
        self.block_size = block_size
        self.max_steps_in_flight = max_steps_in_flight
        self.pool = FakeBlockPool(num_blocks=num_blocks, block_size=block_size)
        self.blocks = FakeKVCache(self.pool)
        self.requests: dict[str, FakeRequest] = {}
        self.running: list[FakeRequest] = []
        self.waiting: deque[FakeRequest] = deque()
        self.on_lost: Callable[[str, str], None] = lambda _request_id, _what: None
        self._steps: deque[list[ScheduledRequest]] = deque()
        self._exports: dict[str, Export] = {}
        self._awaited: list[tuple[FakeRequest, int, Future[None]]] = []
        self._imports: dict[str, FakeRequest] = {}

    # ---- serving ----------------------------------------------------------------------------

    def add_request(
        self, request_id: str, prompt_token_ids: Sequence[int], max_output_tokens: int
    ) -> None:
        request = FakeRequest(
            request_id=request_id,
            token_ids=list(prompt_token_ids),
            num_prompt_tokens=len(prompt_token_ids),
            max_output_tokens=max_output_tokens,
        )
        self.requests[request_id] = request
        self.waiting.append(request)

    def take_over(self, state: RequestState) -> None:
        """Go on with a request of which only the tokens are known: they are computed again."""
        request = _request_of(state)
        for _ in state.output_token_ids:
            request.generator_state = next_state(request.generator_state)
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def abort(self, request_id: str) -> None:
        """Drop the request with no further output; nothing if it is not here."""
        request = self.requests.get(request_id)
        if request is not None:
            self._drop(request)
            self._lose(request_id, "aborted")

    def preempt(self, request_id: str) -> None:
        """Take a running request's blocks away; it is computed again when there is room."""
        request = self.requests[request_id]
        self.running.remove(request)
        self._free(request)
        request.num_computed_tokens = 0
        request.num_in_flight_tokens = 0
        request.num_steps_in_flight = 0
        request.num_preemptions += 1
        self.waiting.appendleft(request)
        self._lose(request_id, "preempted")

    @property
    def num_steps_in_flight(self) -> int:
        return len(self._steps)

    @property
    def scheduled_request_ids(self) -> list[str]:
        """The requests that this engine decodes, or will when there is room."""
        return [request.request_id for request in (*self.running, *self.waiting)]

    def is_suspended(self, request_id: str) -> bool:
        """True if the request is here and only the end of its export will schedule it again."""
        return request_id in self.requests and request_id not in self.scheduled_request_ids

    def is_exporting(self, request_id: str) -> bool:
        """True if there is an export of the request."""
        return request_id in self._exports

    def is_arriving(self, request_id: str) -> bool:
        """True if there is an import of the request."""
        return request_id in self._imports

    def schedule_step(self) -> bool:
        """Begin a step; False if there is nothing to do or too much in flight."""
        if len(self._steps) >= self.max_steps_in_flight:
            return False
        step: list[ScheduledRequest] = []
        for request in list(self.running):
            if request in self.running and self._has_work(request) and self._make_room(request):
                step.append(self._begin(request))
        step = [each for each in step if each.request in self.running]
        while self.waiting and self._allocate_prompt(self.waiting[0]):
            request = self.waiting.popleft()
            self.running.append(request)
            if self._has_work(request):
                step.append(self._begin(request))
        if step:
            self._steps.append(step)
        return bool(step)

    def finish_step(self) -> tuple[FakeOutput, ...]:
        """Let the oldest step in flight take effect; returns its outputs."""
        if not self._steps:
            return ()
        outputs = [
            self._finish(scheduled)
            for scheduled in self._steps.popleft()
            if self.requests.get(scheduled.request.request_id) is scheduled.request
            and scheduled.request.num_preemptions == scheduled.num_preemptions
        ]
        for request_id in list(self._exports):
            self._settle_suspension(self._exports[request_id])
        self._settle_awaited()
        return tuple(outputs)

    def _settle_awaited(self) -> None:
        awaited, self._awaited = self._awaited, []
        for request, num_tokens, future in awaited:
            is_gone = self.requests.get(request.request_id) is not request
            if is_gone or len(request.output_token_ids) >= num_tokens:
                if not future.done():
                    future.set_result(None)
            else:
                self._awaited.append((request, num_tokens, future))

    # ---- migration ---------------------------------------------------------------------------

    @property
    def refusal(self) -> str | None:
        return None

    @property
    def kv(self) -> KVAccess | None:
        """Tests copy ``blocks``: a cell is a token, not bytes."""
        return None

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        return (CacheGroup(block_size=self.block_size),)

    def fingerprint(self) -> str:
        return ""

    def candidates(self) -> list[MigrationCandidate]:
        return [
            MigrationCandidate(
                request_id=request.request_id,
                num_blocks=len(request.block_ids),
                num_output_tokens=len(request.output_token_ids),
            )
            for request in self.running
            if request.output_token_ids and request.request_id not in self._exports
        ]

    def rest(self, request_id: str, refusal: Refusal) -> None:
        """Nothing rests: a test says what moves."""

    def await_output(self, request_id: str, num_tokens: int) -> Future[None]:
        future: Future[None] = Future()
        request = self.requests.get(request_id)
        if request is None:
            future.set_result(None)
        else:
            self._awaited.append((request, num_tokens, future))
            self._settle_awaited()
        return future

    # ---- migration: source ------------------------------------------------------------------

    def start_export(self, request_id: str) -> RequestState:
        request = self.requests.get(request_id)
        if request is None or request not in self.running or not request.output_token_ids:
            raise CannotMigrate("the request is not decoding on this instance")
        if request_id in self._exports:
            raise CannotMigrate("the request is being migrated already")
        self._exports[request_id] = Export(request, request.num_preemptions)
        return state_of(
            SentRequest(
                request_id=request_id,
                prompt_token_ids=tuple(request.token_ids[: request.num_prompt_tokens]),
                max_output_tokens=request.max_output_tokens,
            ),
            request.output_token_ids,
            num_preemptions=request.num_preemptions,
            placement_number=request.placement_number + 1,
        )

    def start_prefix_export(self, request_id: str) -> Future[RequestState]:
        raise CannotMigrate(f"nothing is kept of {request_id}", Refusal.UNSUPPORTED_ENGINE)

    def pin_copyable(self, request_id: str) -> CopyableBlocks:
        export = self._exports[request_id]
        if self._lives(export):
            request = export.request
            num_final_tokens = request.num_computed_tokens - request.num_in_flight_tokens
            export.num_tokens = num_final_tokens
            self._pin(export, num_final_tokens // self.block_size)
        return self._copyable(export)

    def suspend(self, request_id: str) -> Future[SuspendedRequest]:
        export = self._exports[request_id]
        future: Future[SuspendedRequest] = Future()
        if not self._lives(export) or export.request not in self.running:
            future.set_exception(CannotMigrate("the request is not running any more"))
            return future
        self.running.remove(export.request)
        export.suspended = future
        self._settle_suspension(export)
        return future

    def resume(self, request_id: str) -> None:
        export = self._end_export(request_id)
        if export is None or export.suspended is None:
            return
        if self.requests.get(request_id) is export.request:
            self.running.append(export.request)

    def release(self, request_id: str) -> None:
        export = self._end_export(request_id)
        if export is not None and self.requests.get(request_id) is export.request:
            self._drop(export.request)

    # ---- migration: destination -------------------------------------------------------------

    def reserve(self, state: RequestState) -> ReservedBlocks:
        request = _request_of(state)
        if request.request_id in self.requests or request.request_id in self._imports:
            raise CannotMigrate("the destination holds a request of this id already")
        num_cached_blocks = self._allocate_with_prefix(request)
        if num_cached_blocks is None:
            raise CannotMigrate("the destination has no room for the request")
        self._imports[request.request_id] = request
        return ReservedBlocks(
            block_ids=self._tables_of(request), num_cached_blocks=num_cached_blocks
        )

    def grow(self, request_id: str, num_tokens: int) -> BlockTables:
        request = self._imports.get(request_id)
        if request is None:
            raise CannotMigrate("the reservation is gone")
        if not self._extend(request, self._num_blocks(num_tokens)):
            raise CannotMigrate("the destination ran out of blocks while the request grew")
        return self._tables_of(request)

    def commit(self, request_id: str, final: FinalState) -> None:
        request = self._imports.pop(request_id, None)
        if request is None:
            raise CannotMigrate("the reservation is gone")
        request.token_ids[request.num_prompt_tokens :] = final.output_token_ids
        request.num_computed_tokens = final.num_computed_tokens
        assert final.generator_state is not None
        request.generator_state = int(final.generator_state)
        self._publish(request)
        self.requests[request_id] = request
        # Not behind those that wait for blocks: they may be waiting for the ones it holds.
        self.running.append(request)

    def cancel(self, request_id: str) -> None:
        request = self._imports.pop(request_id, None)
        if request is not None:
            self._free(request)

    # ---- invariants -------------------------------------------------------------------------

    def check(self) -> None:
        """Every block has exactly the holders that the engine knows of."""
        held: list[int] = []
        for request in (*self.requests.values(), *self._imports.values()):
            held.extend(request.block_ids)
        for export in self._exports.values():
            held.extend(export.pinned)
        self.pool.check(held)

    # ---- steps ------------------------------------------------------------------------------

    def _has_work(self, request: FakeRequest) -> bool:
        num_outputs = len(request.output_token_ids) + request.num_steps_in_flight
        return num_outputs < request.max_output_tokens

    def _make_room(self, request: FakeRequest) -> bool:
        """Room for one more token, taken from the latest request if need be."""
        num_tokens = len(request.token_ids) + request.num_steps_in_flight
        while not self._extend(request, self._num_blocks(num_tokens)):
            victim = self.running[-1]
            self.preempt(victim.request_id)
            if victim is request:
                return False
        return True

    def _begin(self, request: FakeRequest) -> ScheduledRequest:
        num_tokens = len(request.token_ids) + request.num_steps_in_flight
        scheduled = ScheduledRequest(
            request,
            request.num_preemptions,
            request.num_computed_tokens,
            num_tokens - request.num_computed_tokens,
        )
        request.num_computed_tokens = num_tokens
        request.num_in_flight_tokens += scheduled.num_tokens
        request.num_steps_in_flight += 1
        return scheduled

    def _finish(self, scheduled: ScheduledRequest) -> FakeOutput:
        request = scheduled.request
        last = scheduled.first_position + scheduled.num_tokens
        for position in range(scheduled.first_position, last):
            self._write(request, position)
        request.num_in_flight_tokens -= scheduled.num_tokens
        request.num_steps_in_flight -= 1
        request.generator_state = next_state(request.generator_state)
        token_id = sample(self._read(request, last), request.generator_state)
        request.token_ids.append(token_id)
        self._publish(request)
        num_outputs = len(request.output_token_ids)
        finished = num_outputs >= request.max_output_tokens
        if finished:
            self._drop(request)
            self._lose(request.request_id, "finished")
        return FakeOutput(
            request_id=request.request_id,
            position=num_outputs - 1,
            token_id=token_id,
            finished=finished,
        )

    # ---- blocks -----------------------------------------------------------------------------

    def _write(self, request: FakeRequest, position: int) -> None:
        self.pool.write(request.block_ids, position, request.token_ids[position])

    def _read(self, request: FakeRequest, num_tokens: int) -> list[int]:
        return self.pool.read(request.block_ids, num_tokens)

    def _tables_of(self, request: FakeRequest) -> BlockTables:
        return (list(request.block_ids),)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _allocate_prompt(self, request: FakeRequest) -> bool:
        num_cached_blocks = self._allocate_with_prefix(request)
        if num_cached_blocks is None:
            return False
        request.num_computed_tokens = num_cached_blocks * self.block_size
        return True

    def _allocate_with_prefix(self, request: FakeRequest) -> int | None:
        """Blocks for all tokens, those of a cached prefix shared; how many were, or None."""
        # The last token has to be computed for there to be an output.
        cached = self.pool.cached_prefix(request.token_ids[:-1])
        self.pool.touch(cached)
        request.block_ids = list(cached)
        if self._extend(request, self._num_blocks(len(request.token_ids))):
            return len(cached)
        self._free(request)
        return None

    def _extend(self, request: FakeRequest, num_blocks: int) -> bool:
        num_missing = num_blocks - len(request.block_ids)
        if num_missing <= 0:
            return True
        new = self.pool.allocate(num_missing)
        if new is None:
            return False
        request.block_ids.extend(new)
        return True

    def _publish(self, request: FakeRequest) -> None:
        """Offer the full blocks whose content is final to later requests."""
        num_final_tokens = request.num_computed_tokens - request.num_in_flight_tokens
        self.pool.publish(
            request.block_ids[: num_final_tokens // self.block_size], request.token_ids
        )

    def _free(self, request: FakeRequest) -> None:
        self.pool.free(request.block_ids)
        request.block_ids = []

    def _drop(self, request: FakeRequest) -> None:
        del self.requests[request.request_id]
        if request in self.running:
            self.running.remove(request)
        if request in self.waiting:
            self.waiting.remove(request)
        self._free(request)

    # ---- exports ----------------------------------------------------------------------------

    def _lives(self, export: Export) -> bool:
        request = export.request
        return (
            self.requests.get(request.request_id) is request
            and request.num_preemptions == export.num_preemptions
        )

    def _pin(self, export: Export, num_blocks: int) -> None:
        new = export.request.block_ids[len(export.pinned) : num_blocks]
        self.pool.touch(new)
        export.pinned.extend(new)

    def _copyable(self, export: Export) -> CopyableBlocks:
        return CopyableBlocks(
            block_ids=(list(export.pinned),),
            num_tokens=export.num_tokens,
            num_preemptions=export.request.num_preemptions,
        )

    def _settle_suspension(self, export: Export) -> None:
        future, request = export.suspended, export.request
        if future is None or future.done() or request.num_steps_in_flight > 0:
            return
        export.num_tokens = request.num_computed_tokens
        self._pin(export, self._num_blocks(request.num_computed_tokens))
        future.set_result(
            SuspendedRequest(
                final=FinalState(
                    output_token_ids=list(request.output_token_ids),
                    num_computed_tokens=request.num_computed_tokens,
                    generator_state=b"%d" % request.generator_state,
                ),
                blocks=self._copyable(export),
                suspended_at_s=0.0,
            )
        )

    def _lose(self, request_id: str, what: str) -> None:
        export = self._exports.get(request_id)
        if export is None or export.is_lost:
            return
        export.is_lost = True
        if export.suspended is not None and not export.suspended.done():
            export.suspended.set_exception(CannotMigrate(f"the request was {what}"))
        self.on_lost(request_id, what)

    def _end_export(self, request_id: str) -> Export | None:
        export = self._exports.pop(request_id, None)
        if export is not None:
            self.pool.free(export.pinned)
        return export


def _request_of(state: RequestState) -> FakeRequest:
    sent = sent_request(state)
    return FakeRequest(
        request_id=sent.request_id,
        token_ids=[*sent.prompt_token_ids, *state.output_token_ids],
        num_prompt_tokens=len(sent.prompt_token_ids),
        max_output_tokens=sent.max_output_tokens,
        placement_number=state.placement_number,
        num_preemptions=state.num_preemptions,
    )
