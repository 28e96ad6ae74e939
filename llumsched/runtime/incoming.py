"""Requests on their way in: the destination's side of every migration.

A reservation lives until it is committed, released, or its deadline passes with nothing heard
from the source, so a dead source leaks no blocks. Outcomes are remembered, so a repeated
commit is acknowledged again, and a commit that comes after a release or a query is refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from llumsched.engine.vllm.migration import CannotMigrate, MigrationPort, Reservation
from llumsched.engine.vllm.state import FinalState, RequestState
from llumsched.runtime.messages import (
    Commit,
    CommitAnswer,
    Reserve,
    Reserved,
    ReserveRejected,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Longer than the source's own limits on any one stage, so that it never undercuts a live source.
RESERVATION_DEADLINE_S = 60.0
GRAMMAR_TIMEOUT_S = 4.0
# Outcomes remembered of migrations whose source did not confirm that it knows.
MAX_REMEMBERED_OUTCOMES = 10_000


@dataclass(slots=True)
class _Incoming:
    request_id: str
    source: str
    block_ids: list[int]
    deadline: asyncio.TimerHandle
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class IncomingMigrations:
    """All reservations of one instance. Every method runs on the migrator's loop."""

    def __init__(
        self,
        *,
        port: MigrationPort,
        call: Callable[[Callable[[], Any]], Future[Any]],
        abort: Callable[[str], None],
    ) -> None:
        self._port = port
        self._call = call
        self._abort = abort
        self._reserved: dict[str, _Incoming] = {}
        self._outcomes: dict[str, str | None] = {}

    @property
    def num_reserved(self) -> int:
        return len(self._reserved)

    @property
    def num_reserved_blocks(self) -> int:
        return sum(len(incoming.block_ids) for incoming in self._reserved.values())

    async def reserve(self, message: Reserve) -> Reserved | ReserveRejected:
        migration_id = message.migration_id
        if migration_id in self._reserved or migration_id in self._outcomes:
            return ReserveRejected(migration_id=migration_id, reason="reserved before")
        try:
            state = msgspec.msgpack.decode(message.state, type=RequestState)
            reservation: Reservation = await self._engine(lambda: self._port.reserve(state))
        except (CannotMigrate, msgspec.DecodeError, msgspec.ValidationError) as error:
            return ReserveRejected(migration_id=migration_id, reason=str(error))
        deadline = asyncio.get_running_loop().call_later(
            RESERVATION_DEADLINE_S, self._expire, migration_id
        )
        self._reserved[migration_id] = _Incoming(
            message.request_id, message.source, reservation.block_ids, deadline
        )
        if reservation.grammar is not None:
            try:
                await asyncio.wait_for(
                    asyncio.wrap_future(reservation.grammar), GRAMMAR_TIMEOUT_S
                )
            except Exception as error:
                await self.release(migration_id)
                return ReserveRejected(
                    migration_id=migration_id, reason=f"the grammar did not compile: {error!r}"
                )
        return Reserved(migration_id=migration_id, num_cached_blocks=reservation.num_cached_blocks)

    async def block_ids(self, migration_id: str, first_block: int, num_blocks: int) -> list[int]:
        """Where to write blocks of the request; grows the reservation when it is too small.

        Raises:
            CannotMigrate: if it cannot grow or is gone.
        """
        incoming = self._reserved.get(migration_id)
        if incoming is None:
            raise CannotMigrate("the reservation is gone")
        last = first_block + num_blocks
        if last > len(incoming.block_ids):
            request_id = incoming.request_id
            incoming.block_ids = await self._engine(lambda: self._port.grow(request_id, last))
        return incoming.block_ids[first_block:last]

    async def commit(self, message: Commit) -> CommitAnswer:
        migration_id = message.migration_id
        incoming = self._reserved.get(migration_id)
        if incoming is None:
            return self._answer(migration_id)
        async with incoming.lock:
            if migration_id not in self._outcomes:
                try:
                    final = msgspec.msgpack.decode(message.final, type=FinalState)
                    request_id = incoming.request_id
                    await self._engine(lambda: self._port.commit(request_id, final))
                    self._conclude(migration_id, None)
                except Exception as error:
                    logger.warning("Commit of migration %s refused: %s", migration_id, error)
                    request_id = incoming.request_id
                    await self._engine(lambda: self._port.cancel(request_id))
                    self._conclude(migration_id, str(error))
        return self._answer(migration_id)

    async def query(self, migration_id: str) -> CommitAnswer:
        """What became of a commit; one that has not arrived by now is refused for good."""
        incoming = self._reserved.get(migration_id)
        if incoming is not None:
            async with incoming.lock:
                pass  # a commit under way is waited for
            await self.release(migration_id)
        return self._answer(migration_id)

    async def release(self, migration_id: str) -> None:
        incoming = self._reserved.get(migration_id)
        if incoming is None:
            self._outcomes.setdefault(migration_id, "released")
            return
        async with incoming.lock:
            if migration_id in self._reserved:
                request_id = incoming.request_id
                self._conclude(migration_id, "released")
                await self._engine(lambda: self._port.cancel(request_id))

    def closed(self, migration_id: str) -> None:
        self._outcomes.pop(migration_id, None)

    def abort(self, request_id: str) -> None:
        self._abort(request_id)

    def source_gone(self, source: str) -> None:
        """A dead source commits nothing any more."""
        for migration_id, incoming in list(self._reserved.items()):
            if incoming.source == source:
                self._expire(migration_id)

    def _expire(self, migration_id: str) -> None:
        if migration_id in self._reserved:
            logger.warning("Reservation of migration %s expired", migration_id)
            asyncio.ensure_future(self.release(migration_id))

    def _conclude(self, migration_id: str, refused: str | None) -> None:
        incoming = self._reserved.pop(migration_id)
        incoming.deadline.cancel()
        self._outcomes[migration_id] = refused
        while len(self._outcomes) > MAX_REMEMBERED_OUTCOMES:
            del self._outcomes[next(iter(self._outcomes))]

    def _answer(self, migration_id: str) -> CommitAnswer:
        # A migration never heard of cannot have been committed, and from now on never will be.
        refused = self._outcomes.setdefault(migration_id, "not reserved here")
        return CommitAnswer(migration_id=migration_id, refused=refused)

    async def _engine(self, function: Callable[[], T]) -> T:
        result: T = await asyncio.wrap_future(self._call(function))
        return result
