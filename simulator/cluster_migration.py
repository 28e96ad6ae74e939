"""Migrations in the simulated cluster: both ends by the tables of the core.

The tables (`core.migration`, `core.migration_destination`) decide; this carries their commands out
on two engine models and turns what happens into events. Messages between instances take
`message_delay_s`; a copy takes what the hardware file says, and slows both ends meanwhile. Links
lose nothing and keep the order, so a destination forgets a migration once it has released it.

Invariant: blocks set aside at a destination are those of its open reservations; a request is in the
batch of one engine at most. This module does not know why a migration was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from llumsched.core import migration as source_side
from llumsched.core import migration_destination as destination_side
from llumsched.core.actions import StartMigration
from llumsched.core.events import MigrationFinished, MigrationOutcome
from llumsched.core.migration_destination import ReservationOptions, ReservationState
from llumsched.core.migration_record import MigrationOptions
from llumsched.core.policy import MigrationCandidate, VictimPolicy, settled
from llumsched.core.types import num_blocks_for
from llumsched.simulator.engine_base import Engine
from llumsched.simulator.engine_request import LiveRequest, Phase
from llumsched.simulator.kernel import Kernel, to_ps, to_s


class Move:
    """One migration, at both ends, and what is recorded of it."""

    __slots__ = (
        "destination",
        "downtime",
        "end",
        "held",
        "is_admitted",
        "is_copying",
        "migration",
        "num_blocks_copied",
        "num_reserved",
        "order",
        "outcome",
        "request",
        "reservation",
        "source",
        "source_blocks",
        "source_held",
        "source_progress",
        "start",
    )

    def __init__(
        self, order: StartMigration, request: LiveRequest, source: Engine, destination: Engine
    ) -> None:
        self.order = order
        self.request = request
        self.source = source
        self.destination = destination
        self.migration: source_side.Migration
        self.reservation = destination_side.absent(order.migration_id)
        self.start = 0
        self.end = -1
        self.outcome = ""
        self.num_blocks_copied = 0
        self.downtime = -1
        """From the last token at the source to the first at the destination."""
        self.num_reserved = 0
        """Blocks at the destination, those found in its cache not counted."""
        self.held: list[int] = []
        """Hashes of the blocks found in its cache."""
        self.source_blocks = 0
        self.source_held: list[int] = []
        """What the request holds at the source while it may have moved already."""
        self.source_progress = (0, 0)
        """Its tokens computed and produced when it was suspended."""
        self.is_copying = False
        self.is_admitted = False

    @property
    def migration_id(self) -> str:
        """The scheduler's name of it."""
        return self.order.migration_id


class MigrationHost(Protocol):
    """Whom the migrations tell how they ended."""

    def migration_ended(self, event: MigrationFinished, now: int) -> None: ...


class Migrations:
    """All migrations under way."""

    def __init__(
        self,
        *,
        kernel: Kernel,
        host: MigrationHost,
        victim: VictimPolicy | None,
        options: MigrationOptions,
        message_delay: int,
        copy: Callable[[int], int],
    ) -> None:
        """`copy` gives the picoseconds that copying a number of blocks takes."""
        self._kernel = kernel
        self._host = host
        self._victim = victim
        self._options = options
        self._reservation_options = ReservationOptions()
        self._delay = message_delay
        self._copy = copy
        self.moves: list[Move] = []
        """Every migration that chose a request, in the order of their start."""
        self._leaving: dict[int, dict[str, Move]] = {}
        self._coming: dict[int, dict[str, Move]] = {}
        self.num_in: dict[int, int] = {}
        self.num_out: dict[int, int] = {}
        self.num_victim_failures = 0

    def open_at(self, engine: Engine) -> tuple[list[Move], list[Move]]:
        """Migrations leaving an instance, and those that have a reservation there."""
        return (
            list(self._leaving.get(engine.index, {}).values()),
            list(self._coming.get(engine.index, {}).values()),
        )

    # ---- start and end --------------------------------------------------------------------

    def start(
        self,
        order: StartMigration,
        named: LiveRequest | None,
        source: Engine,
        destination: Engine,
        now: int,
    ) -> None:
        """The source has the order: choose a request, unless it is `named`, and begin."""
        request = named
        if order.request_id is None:
            request = self._choose(order, source, now)
        if request is None:
            self._report(order, None, MigrationOutcome.NOTHING_TO_MOVE, "nothing can move", now)
            return
        if not self._is_movable(request, source):
            reason = "the request is not decoding here, or is being moved already"
            self._report(order, request, MigrationOutcome.REFUSED, reason, now)
            return
        move = Move(order, request, source, destination)
        move.start = now
        self.moves.append(move)
        self._leaving.setdefault(source.index, {})[order.migration_id] = move
        self.num_out[source.index] = self.num_out.get(source.index, 0) + 1
        request.migration = move
        move.migration, commands = source_side.start(
            migration_id=order.migration_id,
            request_id=request.request_id,
            source=source.instance_id,
            destination=destination.instance_id,
            num_preemptions=request.num_preemptions,
            options=self._options,
        )
        self._arm(move, now)
        for command in commands:
            self._at_source(move, command, now)

    def _choose(self, order: StartMigration, source: Engine, now: int) -> LiveRequest | None:
        progress = source.progress_at(now)
        block_size = source.block_size
        requests: dict[str, LiveRequest] = {}
        candidates = []
        for request in source.running:
            if not self._is_movable(request, source):
                continue
            num_tokens = progress + request.offset + 1
            requests[request.request_id] = request
            candidates.append(
                MigrationCandidate(
                    request_id=request.request_id,
                    num_blocks=num_blocks_for(num_tokens, block_size),
                    num_output_tokens=num_tokens - request.num_prompt,
                    execution_priority=request.execution_priority,
                    predicted_output_tokens=request.predicted,
                    since_migration_s=to_s(now - request.moved) if request.moved >= 0 else None,
                )
            )
        rested = settled(candidates, order.settle_s)
        if self._victim is None:
            return requests[rested[0].request_id] if rested else None
        try:
            chosen = self._victim.choose(rested)
        except Exception:
            # As at a real source: any request may move, and somebody counts it.
            self.num_victim_failures += 1
            chosen = rested
        return next((requests[c.request_id] for c in chosen if c.request_id in requests), None)

    @staticmethod
    def _is_movable(request: LiveRequest, source: Engine) -> bool:
        return (
            request.place is source
            and request.phase == Phase.DECODING
            and request.migration is None
            and request.inbound is None
        )

    def _report(
        self,
        order: StartMigration,
        request: LiveRequest | None,
        outcome: MigrationOutcome,
        reason: str,
        now: int,
    ) -> None:
        event = MigrationFinished(
            migration_id=order.migration_id,
            request_id=None if request is None else request.request_id,
            source=order.source,
            destination=order.destination,
            outcome=outcome,
            reason=reason,
        )
        self._kernel.send(now + self._delay, lambda at: self._host.migration_ended(event, at))

    def _ended(self, move: Move, now: int) -> None:
        """The source's record is terminal."""
        migration = move.migration
        if move.end >= 0:
            return
        move.end = now
        self._leaving[move.source.index].pop(move.migration_id, None)
        self.num_out[move.source.index] -= 1
        if move.request.migration is move:
            move.request.migration = None
        reason = migration.abort_reason
        if migration.state is source_side.MigrationState.COMMITTED:
            move.outcome = MigrationOutcome.COMMITTED.value
            self._report(move.order, move.request, MigrationOutcome.COMMITTED, "", now)
            return
        move.outcome = reason.value if reason is not None else MigrationOutcome.ABORTED.value
        refused = reason is source_side.AbortReason.RESERVATION_REJECTED
        outcome = MigrationOutcome.REFUSED if refused else MigrationOutcome.ABORTED
        self._report(move.order, move.request, outcome, move.outcome.replace("_", " "), now)

    # ---- the source -----------------------------------------------------------------------

    def request_finished(self, request: LiveRequest, now: int) -> None:
        """The engine's word; the source's migrator hears it an instant later."""
        self._later(request, source_side.RequestFinished, now)

    def request_preempted(self, request: LiveRequest, now: int) -> None:
        """As `request_finished`."""
        self._later(request, source_side.RequestPreempted, now)

    def _later(
        self,
        request: LiveRequest,
        kind: type[source_side.RequestFinished | source_side.RequestPreempted],
        now: int,
    ) -> None:
        move = request.migration
        event = kind(migration_id=move.migration_id)
        self._kernel.send(now + 1, lambda at: self._source_event(move, event, at))

    def request_suspended(self, request: LiveRequest, now: int) -> None:
        """No step touches the request any more."""
        move = request.migration
        move.source_blocks, move.source_held = request.num_blocks, request.held
        move.source_progress = (request.computed, request.generated)
        event = source_side.RequestSuspended(
            migration_id=move.migration_id,
            num_blocks_to_copy=max(0, request.num_blocks - move.migration.num_blocks_copied),
            num_preemptions=request.num_preemptions,
        )
        self._kernel.send(now + 1, lambda at: self._source_event(move, event, at))

    def _source_event(self, move: Move, event: source_side.MigrationEvent, now: int) -> None:
        before = move.migration
        if before.is_terminal or not move.source.is_alive:
            return
        if not source_side.is_current(before, event):
            return
        move.migration, commands = source_side.advance(before, event)
        after = move.migration
        if (after.state, after.stage) != (before.state, before.stage) or isinstance(
            event, source_side.DeadlineExpired
        ):
            self._arm(move, now)
        for command in commands:
            self._at_source(move, command, now)
        if after.is_terminal:
            self._ended(move, now)

    def _arm(self, move: Move, now: int) -> None:
        migration = move.migration
        timeout_s = source_side.timeout_s(migration)
        if timeout_s is None:
            return
        event = source_side.DeadlineExpired(
            migration_id=migration.migration_id, state=migration.state, stage=migration.stage
        )
        at = now + to_ps(timeout_s)
        self._kernel.send(at, lambda at: self._source_event(move, event, at))

    def _at_source(self, move: Move, command: source_side.MigrationCommand, now: int) -> None:
        migration_id = move.migration_id
        request = move.request
        match command:
            case source_side.ReserveBlocks():
                num_tokens = move.source.progress_at(now) + request.offset + 1
                asked = destination_side.ReservationRequested(
                    migration_id=migration_id,
                    request_id=request.request_id,
                    source=move.source.instance_id,
                )
                self._kernel.send(
                    now + self._delay, lambda at: self._asked(move, asked, num_tokens, at)
                )
            case source_side.CopyBlocks():
                self._begin_copy(move, command, now)
            case source_side.SuspendRequest():
                if request.phase == Phase.DECODING:
                    move.source.suspend(request, now)
            case source_side.CommitRequest():
                self._to_destination(
                    move,
                    destination_side.CommitRequested(
                        migration_id=migration_id, num_blocks=command.num_blocks
                    ),
                    now,
                )
            case source_side.QueryCommit():
                self._to_destination(
                    move, destination_side.CommitQueried(migration_id=migration_id), now
                )
            case source_side.ReleaseBlocks(side=source_side.Side.SOURCE):
                move.source.release(move.source_blocks, move.source_held, now)
            case source_side.ReleaseBlocks():
                self._to_destination(
                    move, destination_side.ReleaseRequested(migration_id=migration_id), now
                )
            case source_side.ResumeRequest():
                if move.is_admitted:
                    self._take_back(move)
                if request.phase == Phase.SUSPENDED:
                    move.source.resume(request, now)
                elif request in move.source.suspending:
                    move.source.suspending.remove(request)
            case source_side.CloseMigration():
                self._to_destination(
                    move, destination_side.MigrationClosed(migration_id=migration_id), now
                )
            case _:
                raise AssertionError(f"no client aborts in a simulation: {command}")

    @staticmethod
    def _take_back(move: Move) -> None:
        """The destination died with the request before it could say so: the source has it still.

        The client drops, by position, the tokens that now come again.
        """
        request = move.request
        request.computed, request.generated = move.source_progress
        request.num_blocks, request.held = move.source_blocks, move.source_held
        request.num_migrations -= 1
        request.inbound = None
        request.phase = Phase.SUSPENDED
        move.is_admitted = False

    def _begin_copy(self, move: Move, command: source_side.CopyBlocks, now: int) -> None:
        source, destination = move.source, move.destination
        move.num_blocks_copied += command.num_blocks
        self._to_destination(
            move,
            destination_side.StageAnnounced(
                migration_id=move.migration_id,
                stage=command.stage,
                first_block=command.first_block,
                num_blocks=command.num_blocks,
            ),
            now,
        )
        source.set_copying(1, now)
        destination.set_copying(1, now)
        written = destination_side.BlocksWritten(
            migration_id=move.migration_id,
            stage=command.stage,
            num_blocks_total=command.first_block + command.num_blocks,
        )

        def end(at: int) -> None:
            source.set_copying(-1, at)
            destination.set_copying(-1, at)
            self._destination_event(move, written, at)

        self._kernel.send(now + max(self._delay, self._copy(command.num_blocks)), end)

    def _num_full_blocks(self, move: Move, now: int) -> int:
        """Blocks of the request that no step in flight writes to."""
        request = move.request
        if request.phase == Phase.DECODING and request.place is move.source:
            num_tokens: int = move.source.progress_at(now) + request.offset
            return num_tokens // int(move.source.block_size)
        if request.phase == Phase.SUSPENDED:
            return request.num_blocks
        return move.migration.num_copyable_blocks

    # ---- the destination ------------------------------------------------------------------

    def _to_destination(
        self, move: Move, event: destination_side.ReservationEvent, now: int
    ) -> None:
        self._kernel.send(now + self._delay, lambda at: self._destination_event(move, event, at))

    def _asked(
        self,
        move: Move,
        event: destination_side.ReservationRequested,
        num_tokens: int,
        now: int,
    ) -> None:
        """The reservation is asked for; `num_tokens` is the size of the request."""
        self._destination_event(move, event, now)
        if move.reservation.state is not ReservationState.ALLOCATING:
            return
        engine = move.destination
        hashes = move.request.hashes
        num_found = num_idle = 0
        if engine.cache is not None and hashes:
            engine.cache.shrink(engine.num_free_at(now))
            num_found, num_idle = engine.cache.match(hashes, num_tokens // engine.block_size)
        needed = num_blocks_for(num_tokens, engine.block_size) - num_found
        answer: destination_side.ReservationEvent
        if engine.reserve(needed + num_idle, now):
            if num_found:
                assert engine.cache is not None
                move.held = list(hashes[:num_found])
                engine.cache.hold(move.held)
                engine.num_reserved -= num_idle
                engine.num_used += num_idle
            move.num_reserved = needed
            self._coming.setdefault(engine.index, {})[move.migration_id] = move
            self.num_in[engine.index] = self.num_in.get(engine.index, 0) + 1
            answer = destination_side.BlocksAllocated(
                migration_id=move.migration_id, num_cached_blocks=num_found
            )
        else:
            answer = destination_side.AllocationFailed(
                migration_id=move.migration_id, reason="not enough free blocks"
            )
        self._destination_event(move, answer, now)

    def _destination_event(
        self, move: Move, event: destination_side.ReservationEvent, now: int
    ) -> None:
        before = move.reservation
        if not move.destination.is_alive or not destination_side.is_current(before, event):
            return
        move.reservation, commands = destination_side.advance(before, event)
        after = move.reservation
        if (after.state, after.stage) != (before.state, before.stage) or isinstance(
            event, destination_side.ReservationExpired
        ):
            self._arm_reservation(move, now)
        for command in commands:
            self._at_destination(move, command, now)

    def _arm_reservation(self, move: Move, now: int) -> None:
        reservation = move.reservation
        # A released reservation is forgotten at once: nothing late can come for it.
        timeout_s = destination_side.timeout_s(reservation, self._reservation_options)
        if timeout_s is None or reservation.state is ReservationState.RELEASED:
            return
        event = destination_side.ReservationExpired(
            migration_id=move.migration_id, state=reservation.state, stage=reservation.stage
        )
        at = now + to_ps(timeout_s)
        self._kernel.send(at, lambda at: self._destination_event(move, event, at))

    def _to_source(
        self, move: Move, make: Callable[[int], source_side.MigrationEvent], now: int
    ) -> None:
        """An answer; what it says of the source is read when it comes."""

        def come(at: int) -> None:
            # A request that has ended is told of by itself, just now.
            if move.request.phase != Phase.ENDED:
                self._source_event(move, make(at), at)

        self._kernel.send(now + self._delay, come)

    def _at_destination(
        self, move: Move, command: destination_side.ReservationCommand, now: int
    ) -> None:
        migration_id = move.migration_id
        match command:
            case destination_side.AllocateBlocks():
                # `_asked` has the size of the request, and answers.
                return
            case destination_side.ReceiveBlocks():
                self._grow(move, command.first_block + command.num_blocks, now)
            case destination_side.AdmitRequest():
                self._admit(move, now)
            case destination_side.FreeBlocks():
                self._free(move, now)
            case destination_side.ConfirmReservation():
                num_cached = command.num_cached_blocks
                self._to_source(
                    move,
                    lambda at: source_side.BlocksReserved(
                        migration_id=migration_id,
                        num_cached_blocks=num_cached,
                        num_full_blocks_now=self._num_full_blocks(move, at),
                        num_preemptions=move.request.num_preemptions,
                    ),
                    now,
                )
            case destination_side.RejectReservation():
                rejected = source_side.ReservationRejected(
                    migration_id=migration_id, reason=command.reason
                )
                self._to_source(move, lambda _: rejected, now)
            case destination_side.ConfirmCopy():
                stage, total = command.stage, command.num_blocks_total
                self._to_source(
                    move,
                    lambda at: source_side.BlocksCopied(
                        migration_id=migration_id,
                        stage=stage,
                        num_blocks_total=total,
                        num_full_blocks_now=self._num_full_blocks(move, at),
                        num_preemptions=move.request.num_preemptions,
                    ),
                    now,
                )
            case destination_side.AcknowledgeCommit():
                done = source_side.CommitAcknowledged(migration_id=migration_id)
                # The request may have ended here by then; the source is told all the same.
                self._kernel.send(now + self._delay, lambda at: self._source_event(move, done, at))
            case destination_side.RefuseCommit():
                refused = source_side.CommitRefused(
                    migration_id=migration_id, reason=command.reason
                )
                self._to_source(move, lambda _: refused, now)
            case _:
                raise AssertionError(f"no client aborts in a simulation: {command}")

    def _grow(self, move: Move, num_blocks: int, now: int) -> None:
        more = num_blocks - move.num_reserved - len(move.held)
        if more <= 0:
            return
        if move.destination.reserve(more, now):
            move.num_reserved += more
            return
        failed = destination_side.AllocationFailed(
            migration_id=move.migration_id, reason="not enough free blocks"
        )
        self._destination_event(move, failed, now)

    def _admit(self, move: Move, now: int) -> None:
        engine, request = move.destination, move.request
        needed = request.num_blocks - len(move.held)
        surplus = move.num_reserved - needed
        engine.num_reserved -= move.num_reserved
        engine.num_used += needed
        self._close_coming(move)
        request.held = move.held
        if engine.cache is not None:
            full = min(request.computed // engine.block_size, len(request.hashes))
            request.held += engine.cache.store(request.hashes[len(move.held) : full])
        request.num_migrations += 1
        request.moved = now
        request.inbound = move
        request.migration = None
        move.is_admitted = True
        engine.received_ids.append(request.request_id)
        engine.resume(request, now)
        if surplus:
            engine.freed(now)
        admitted = destination_side.RequestAdmitted(migration_id=move.migration_id)
        self._destination_event(move, admitted, now)

    def _free(self, move: Move, now: int) -> None:
        engine = move.destination
        if move.migration_id not in self._coming.get(engine.index, {}):
            return
        self._close_coming(move)
        if move.held:
            assert engine.cache is not None
            engine.num_used -= engine.cache.release(move.held)
            move.held = []
        engine.unreserve(move.num_reserved, now)
        move.num_reserved = 0

    def _close_coming(self, move: Move) -> None:
        index = move.destination.index
        del self._coming[index][move.migration_id]
        self.num_in[index] -= 1

    # ---- death ----------------------------------------------------------------------------

    def instance_died(self, engine: Engine, now: int) -> list[MigrationFinished]:
        """An instance is known to be dead; commits that its scheduler was not told of."""
        untold = []
        for move in list(self._leaving.get(engine.index, {}).values()):
            if move.is_admitted:
                untold.append(
                    MigrationFinished(
                        migration_id=move.migration_id,
                        request_id=move.request.request_id,
                        source=move.order.source,
                        destination=move.order.destination,
                        outcome=MigrationOutcome.COMMITTED,
                    )
                )
                move.outcome = MigrationOutcome.COMMITTED.value
            else:
                move.outcome = "source_lost"
                if move.request.migration is move:
                    move.request.migration = None
            move.end = now
            del self._leaving[engine.index][move.migration_id]
            self.num_out[engine.index] -= 1
            lost = destination_side.SourceLost(
                migration_id=move.migration_id, reason="it died", is_dead=True
            )
            self._destination_event(move, lost, now)
        for moves in list(self._leaving.values()):
            for move in list(moves.values()):
                if move.destination is engine:
                    gone = source_side.PeerLost(
                        migration_id=move.migration_id, reason="it died", is_dead=True
                    )
                    self._source_event(move, gone, now)
        return untold
