"""The fake engine, which remembers requests that have ended by what it caches of them."""

from __future__ import annotations

from concurrent.futures import Future

import msgspec

from llumsched.engine.base import (
    CannotMigrate,
    CopyableBlocks,
    FinalState,
    RequestState,
    ReservedBlocks,
    SuspendedRequest,
)
from tests.fake_engine.engine import FakeEngine
from tests.fake_engine.request import Export, FakeRequest, SentRequest, sent_request, state_of


class PrefixEngine(FakeEngine):
    """``ended`` are the requests that are here no more."""

    def __init__(self, *, num_blocks: int, block_size: int, max_steps_in_flight: int = 1) -> None:
        super().__init__(
            num_blocks=num_blocks, block_size=block_size, max_steps_in_flight=max_steps_in_flight
        )
        self.ended: dict[str, FakeRequest] = {}
        self._copied: set[str] = set()
        self._kept: set[str] = set()

    def _drop(self, request: FakeRequest) -> None:
        self.ended[request.request_id] = request
        super()._drop(request)

    def _lose(self, request_id: str, what: str) -> None:
        if request_id not in self._copied:
            super()._lose(request_id, what)

    # ---- source -----------------------------------------------------------------------------

    def start_prefix_export(self, request_id: str) -> Future[RequestState]:
        request = self.ended.get(request_id)
        if request is None or request_id in self.requests or request_id in self._exports:
            raise CannotMigrate("the request has not ended here")
        cached = self.pool.cached_prefix(request.token_ids[:-1])
        if not cached:
            raise CannotMigrate("nothing of the request is cached any more")
        num_tokens = len(cached) * self.block_size
        self.pool.touch(cached)
        self._copied.add(request_id)
        self._exports[request_id] = Export(
            request, request.num_preemptions, pinned=cached, num_tokens=num_tokens
        )
        sent = SentRequest(
            request_id=request_id,
            prompt_token_ids=tuple(request.token_ids[: num_tokens + 1]),
            max_output_tokens=1,
        )
        future: Future[RequestState] = Future()
        state = state_of(sent, (), placement_number=0, num_preemptions=request.num_preemptions)
        future.set_result(msgspec.structs.replace(state, has_ended=True))
        return future

    def pin_copyable(self, request_id: str) -> CopyableBlocks:
        if request_id in self._copied:
            return self._copyable(self._exports[request_id])
        return super().pin_copyable(request_id)

    def suspend(self, request_id: str) -> Future[SuspendedRequest]:
        if request_id not in self._copied:
            return super().suspend(request_id)
        export = self._exports[request_id]
        final = FinalState(
            output_token_ids=[], num_computed_tokens=export.num_tokens, generator_state=None
        )
        future: Future[SuspendedRequest] = Future()
        future.set_result(
            SuspendedRequest(final=final, blocks=self._copyable(export), suspended_at_s=0.0)
        )
        return future

    def _end_export(self, request_id: str) -> Export | None:
        self._copied.discard(request_id)
        return super()._end_export(request_id)

    # ---- destination ------------------------------------------------------------------------

    def reserve(self, state: RequestState) -> ReservedBlocks:
        reserved = super().reserve(state)
        if state.has_ended:
            self._kept.add(sent_request(state).request_id)
        return reserved

    def commit(self, request_id: str, final: FinalState) -> None:
        request = self._imports.get(request_id)
        if request is None or request_id not in self._kept:
            super().commit(request_id, final)
            return
        self.pool.read(request.block_ids, final.num_computed_tokens)
        request.num_computed_tokens = final.num_computed_tokens
        self._publish(request)
        self.cancel(request_id)

    def cancel(self, request_id: str) -> None:
        self._kept.discard(request_id)
        super().cancel(request_id)
