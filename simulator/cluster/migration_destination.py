"""The destination's end of migrations: the core's table, carried out on an engine model.

Links lose nothing and keep the order, so a reservation is forgotten once it is released. Invariant:
blocks set aside at an instance are those of its open reservations. This module does not know the
source's end (`cluster_migration`), only how to answer it.
"""

from __future__ import annotations

from collections.abc import Callable

from llumsched.core.migration.destination import machine as protocol
from llumsched.core.migration.destination.machine import ReservationOptions, ReservationState
from llumsched.core.migration.source import machine as source_side
from llumsched.core.types import num_blocks_for
from llumsched.simulator.cluster.migration_record import Move, OpenMoves
from llumsched.simulator.engines.request import DECODING, SUSPENDED
from llumsched.simulator.kernel import Kernel, to_ps

Answer = Callable[[Move, Callable[[int], source_side.MigrationEvent], int], None]


class Reservations:
    """All migrations at their destinations."""

    def __init__(self, kernel: Kernel, answer: Answer) -> None:
        """`answer(move, make, now)` brings the source the event that `make` gives on its arrival:
        what it says of the source is read then."""
        self._kernel = kernel
        self._answer = answer
        self._options = ReservationOptions()
        self.open = OpenMoves()

    def asked(
        self, move: Move, event: protocol.ReservationRequested, num_tokens: int, now: int
    ) -> None:
        """A reservation is asked for a request of `num_tokens` tokens."""
        self.handle(move, event, now)
        if move.reservation.state is ReservationState.ALLOCATING:
            self.handle(move, self._allocate(move, num_tokens, now), now)

    def _allocate(self, move: Move, num_tokens: int, now: int) -> protocol.ReservationEvent:
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
        return protocol.BlocksAllocated(migration_id=move.migration_id, num_cached_blocks=num_found)

    def handle(self, move: Move, event: protocol.ReservationEvent, now: int) -> None:
        """Something happened at the destination, or came from the source."""
        before = move.reservation
        if not move.destination.is_alive or not protocol.is_current(before, event):
            return
        move.reservation, commands = protocol.advance(before, event)
        after = move.reservation
        if protocol.restarts_timer(before, event, after):
            self._arm(move, now)
        for command in commands:
            self._carry_out(move, command, now)

    def _arm(self, move: Move, now: int) -> None:
        reservation = move.reservation
        timeout_s = protocol.timeout_s(reservation, self._options)
        if timeout_s is None or reservation.state is ReservationState.RELEASED:
            return
        event = protocol.ReservationExpired(
            migration_id=move.migration_id, state=reservation.state, stage=reservation.stage
        )
        self._kernel.send(now + to_ps(timeout_s), lambda at: self.handle(move, event, at))

    def _carry_out(self, move: Move, command: protocol.ReservationCommand, now: int) -> None:
        migration_id = move.migration_id
        match command:
            case protocol.AllocateBlocks():
                # `asked` knows the size of the request, and goes on by itself.
                return
            case protocol.ReceiveBlocks():
                self._grow(move, command.first_block + command.num_blocks, now)
            case protocol.AdmitRequest():
                self._admit(move, now)
            case protocol.FreeBlocks():
                self._free(move, now)
            case protocol.ConfirmReservation():
                num_cached = command.num_cached_blocks
                self._answer(
                    move,
                    lambda at: source_side.BlocksReserved(
                        migration_id=migration_id,
                        num_cached_blocks=num_cached,
                        num_full_blocks_now=num_full_blocks(move, at),
                        num_preemptions=move.request.num_preemptions,
                    ),
                    now,
                )
            case protocol.ConfirmCopy():
                stage, total = command.stage, command.num_blocks_total
                self._answer(
                    move,
                    lambda at: source_side.BlocksCopied(
                        migration_id=migration_id,
                        stage=stage,
                        num_blocks_total=total,
                        num_full_blocks_now=num_full_blocks(move, at),
                        num_preemptions=move.request.num_preemptions,
                    ),
                    now,
                )
            case protocol.RejectReservation():
                rejected = source_side.ReservationRejected(
                    migration_id=migration_id, reason=command.reason
                )
                self._answer(move, lambda _: rejected, now)
            case protocol.AcknowledgeCommit():
                done = source_side.CommitAcknowledged(migration_id=migration_id)
                self._answer(move, lambda _: done, now)
            case protocol.RefuseCommit():
                refused = source_side.CommitRefused(
                    migration_id=migration_id, reason=command.reason
                )
                self._answer(move, lambda _: refused, now)
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
        admitted = protocol.RequestAdmitted(migration_id=move.migration_id)
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


def num_full_blocks(move: Move, now: int) -> int:
    """Blocks of the request at its source that no step in flight writes to."""
    request, source = move.request, move.source
    if request.phase == DECODING and request.place is move.source:
        return (source.progress_at(now) + request.offset) // source.block_size
    if request.phase == SUSPENDED:
        return request.num_blocks
    return move.migration.num_copyable_blocks


def _no_room(move: Move) -> protocol.AllocationFailed:
    return protocol.AllocationFailed(
        migration_id=move.migration_id, reason="not enough free blocks"
    )
