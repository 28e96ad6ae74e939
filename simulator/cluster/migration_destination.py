"""The destination's end of migrations: the core's table, carried out on an engine model.

Links lose nothing and keep the order, so a reservation is forgotten once it is released. Invariant:
blocks set aside at an instance are those of its open reservations. This module does not know the
source's end (`migration_source`), only how to answer it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from llumsched.core.migration.destination import machine
from llumsched.core.migration.destination.events import (
    AdmitRequest,
    AllocateBlocks,
    AllocationFailed,
    BlocksAllocated,
    DestinationCommand,
    DestinationEvent,
    FreeBlocks,
    ReceiveBlocks,
    RequestAdmitted,
    ReservationState,
)
from llumsched.core.migration.destination.record import ReservationOptions
from llumsched.core.migration.messages import (
    BlocksCopied,
    BlocksReserved,
    ReserveBlocks,
    ToSource,
)
from llumsched.core.types import num_blocks_for
from llumsched.simulator.cluster.migration_record import EndOfMove, Move, OpenMoves
from llumsched.simulator.kernel import Kernel, to_s

# Nothing comes late, so what has been released may as well stay so.
_OPTIONS = ReservationOptions(tombstone_s=math.inf)

Answer = Callable[[Move, ToSource, int], None]


class Reservations:
    """All migrations at their destinations."""

    def __init__(self, kernel: Kernel, answer: Answer) -> None:
        """`answer(move, message, now)` brings the source a message."""
        self._kernel = kernel
        self._answer = answer
        self.open = OpenMoves()

    def expect(self, move: Move) -> None:
        """A move begins, of which its destination has not heard."""
        absent = machine.absent(move.migration_id, _OPTIONS)
        move.arriving = EndOfMove(machine, absent, self, move, self._kernel)

    def asked(self, move: Move, message: ReserveBlocks, num_tokens: int, now: int) -> None:
        """A reservation is asked for a request of `num_tokens` tokens."""
        self.handle(move, message, now)
        if move.reservation.state is ReservationState.ALLOCATING:
            self.handle(move, self._allocate(move, num_tokens, now), now)

    def _allocate(self, move: Move, num_tokens: int, now: int) -> DestinationEvent:
        engine = move.destination
        hashes = move.request.hashes
        num_found = num_idle = 0
        if engine.cache is not None and hashes:
            engine.cache.shrink(engine.num_free_at(now))
            num_found, num_idle = engine.cache.match(hashes, num_tokens // engine.block_size)
        needed = num_blocks_for(num_tokens, engine.block_size) - num_found
        if not engine.reserve(needed + num_idle, now):
            return _no_room(move)
        if num_found:
            assert engine.cache is not None
            move.held = hashes[:num_found]
            engine.cache.hold(move.held)
            engine.num_reserved -= num_idle
            engine.num_used += num_idle
        move.num_reserved = needed
        self.open.add(engine.index, move)
        return BlocksAllocated(migration_id=move.migration_id, num_cached_blocks=num_found)

    def handle(self, move: Move, event: DestinationEvent, now: int) -> None:
        """Something happened at the destination, or came from the source."""
        if move.destination.is_alive:
            move.arriving.driver.handle(event)

    def carry_out(self, move: Move, command: DestinationCommand, now: int) -> None:
        """Carry out a command of the table."""
        match command:
            case BlocksReserved() | BlocksCopied():
                ends_in, step = move.destination.step_ahead(now)
                told = replace(command, step_ends_in_s=to_s(ends_in), step_s=to_s(step))
                self._answer(move, told, now)
            case ToSource():
                self._answer(move, command, now)
            case AllocateBlocks():
                # `asked` knows the size of the request, and goes on by itself.
                return
            case ReceiveBlocks():
                self._grow(move, command.first_block + command.num_blocks, now)
            case AdmitRequest():
                self._admit(move, now)
            case FreeBlocks():
                self._free(move, now)
            case _:
                raise AssertionError(f"no client aborts in a simulation: {command}")

    def _grow(self, move: Move, num_blocks: int, now: int) -> None:
        more = num_blocks - move.num_reserved - len(move.held)
        if more <= 0:
            return
        if move.destination.reserve(more, now):
            move.num_reserved += more
        else:
            self.handle(move, _no_room(move), now)

    def _admit(self, move: Move, now: int) -> None:
        """Reserved blocks become the request's, and it waits for a place in the batch."""
        engine, request = move.destination, move.request
        needed = request.num_blocks - len(move.held)
        engine.num_reserved -= move.num_reserved
        engine.num_used += needed
        self.open.remove(engine.index, move)
        request.held = move.held
        if engine.cache is not None:
            full = min(request.computed // engine.block_size, len(request.hashes))
            named = engine.cache.store(request.hashes[len(move.held) : full])
            request.held = [*move.held, *named]
        request.num_migrations += 1
        request.moved = now
        request.inbound = move
        request.migration = None
        move.is_admitted = True
        engine.received_ids.append(request.request_id)
        # This also looks at what is blocked: a reservation may have been larger than needed.
        engine.resume(request, now)
        admitted = RequestAdmitted(migration_id=move.migration_id)
        self.handle(move, admitted, now)

    def _free(self, move: Move, now: int) -> None:
        engine = move.destination
        if not self.open.remove(engine.index, move):
            return
        if move.held:
            assert engine.cache is not None
            engine.num_used -= engine.cache.release(move.held)
            move.held = ()
        engine.unreserve(move.num_reserved, now)
        move.num_reserved = 0


def _no_room(move: Move) -> AllocationFailed:
    return AllocationFailed(migration_id=move.migration_id, reason="not enough free blocks")
