"""Migrations in the simulated cluster, at their source: the core's table, carried out.

The table (`core.migration`) decides; this carries its commands out on an engine model and turns
what happens into events. Messages between instances take `message_delay_s`; a copy takes what the
hardware file says, and slows both ends meanwhile. The destination's end is `migration_destination`.

Invariant: a request is in the batch of one engine at most. This module does not know why a
migration was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from llumsched.core.actions import PolicyFailed, StartMigration
from llumsched.core.events import MigrationFinished, MigrationOutcome
from llumsched.core.migration.destination.events import BlocksWritten
from llumsched.core.migration.events import PeerLost
from llumsched.core.migration.messages import (
    BlocksCopied,
    BlocksReserved,
    CopyBlocks,
    ReserveBlocks,
    ToDestination,
    ToSource,
)
from llumsched.core.migration.source import machine
from llumsched.core.migration.source.events import (
    FinishedAtSource,
    MigrationState,
    PreemptedAtSource,
    ReleaseRequest,
    RequestSuspended,
    ResumeRequest,
    SourceCommand,
    SourceEvent,
    SuspendRequest,
)
from llumsched.core.migration.source.record import AbortReason, MigrationOptions, hand_over_s
from llumsched.core.policy import MigrationCandidate, VictimPolicy, settled
from llumsched.core.scheduling.answer_checks import policy_failed
from llumsched.simulator.cluster.migration_destination import Reservations
from llumsched.simulator.cluster.migration_record import EndOfMove, Move, OpenMoves
from llumsched.simulator.engines.base import Engine
from llumsched.simulator.engines.request import (
    AWAY,
    DECODING,
    ENDED,
    SUSPENDED,
    WAITING,
    LiveRequest,
)
from llumsched.simulator.kernel import Kernel, to_ps, to_s

_NONE = (0, 0)
_PRIORITY_AND_SIZE = ("execution_priority", "num_blocks")


class MigrationHost(Protocol):
    """Whom the migrations tell how they ended."""

    def policy_failed(self, failed: PolicyFailed) -> None: ...

    def migration_ended(self, event: MigrationFinished, now: int) -> None: ...


class Migrations:
    """All migrations of a cluster."""

    def __init__(
        self,
        *,
        kernel: Kernel,
        host: MigrationHost,
        victim: VictimPolicy | None,
        options: MigrationOptions,
        message_delay: int,
        copy: Callable[[int], int],
        predicts_lengths: bool = True,
    ) -> None:
        """`copy` gives the picoseconds that copying a number of blocks takes. Where nothing
        `predicts_lengths`, a policy that says what it goes by need not be asked for a size."""
        self._kernel = kernel
        self._host = host
        self._victim = victim
        first_by = getattr(victim, "first_by", None)
        self._takes_shortest = first_by == _PRIORITY_AND_SIZE and not predicts_lengths
        self._options = options
        self._delay = message_delay
        self._copy = copy
        self._reservations = Reservations(kernel, self._answer)
        self._leaving = OpenMoves()
        self.moves: list[Move] = []
        """Every migration that chose a request, in the order of their start."""

    def counts(self, index: int) -> tuple[int, int]:
        """Migrations that have a reservation at an instance, and that are leaving it."""
        arriving, leaving = self._reservations.open, self._leaving
        if not arriving.num_open and not leaving.num_open:
            return _NONE
        return arriving.count(index), leaving.count(index)

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
        if request.phase == WAITING and request.place is source:
            self._send_on(order, request, source, destination, now)
            return
        if not _is_movable(request, source):
            reason = "the request is not decoding here, or is being moved already"
            self._report(order, request, MigrationOutcome.REFUSED, reason, now)
            return
        move = Move(order, request, source, destination, now)
        self.moves.append(move)
        self._leaving.add(source.index, move)
        request.migration = move
        self._reservations.expect(move)
        migration, commands = machine.start(
            migration_id=order.migration_id,
            request_id=request.request_id,
            source=source.instance_id,
            destination=destination.instance_id,
            num_preemptions=request.num_preemptions,
            options=self._options,
        )
        move.leaving = EndOfMove(machine, migration, self, move, self._kernel)
        move.leaving.driver.begin(commands)

    def _send_on(
        self,
        order: StartMigration,
        request: LiveRequest,
        source: Engine,
        destination: Engine,
        now: int,
    ) -> None:
        """A request that waits holds no KV: it goes from one queue to the end of the other."""
        source.take_back(request, now)
        request.phase = SUSPENDED

        def come(at: int) -> None:
            moves = destination.is_alive or not source.is_alive
            if destination.is_alive:
                request.num_migrations += 1
                destination.add(request, at)
            elif source.is_alive:
                source.add(request, at)
            else:
                request.phase = AWAY
            outcome = MigrationOutcome.COMMITTED if moves else MigrationOutcome.ABORTED
            self._report(order, request, outcome, "" if moves else "destination lost", at)

        self._kernel.send(now + self._delay, come)

    def victim_blocks(self, source: Engine, now: int) -> int | None:
        """Blocks of the request that would move next; None if there is none."""
        if self._takes_shortest:
            shortest = _shortest_of_lowest(source)
            if shortest is None:
                return None
            return -(-(source.progress_at(now) + shortest.offset + 1) // source.block_size)
        victims = self._ordered(self._candidates(source, now))
        return victims[0].num_blocks if victims else None

    def _choose(self, order: StartMigration, source: Engine, now: int) -> LiveRequest | None:
        requests = {r.request_id: r for r in source.running if _is_movable(r, source)}
        chosen = self._ordered(settled(self._candidates(source, now), order.settle_s))
        return next((requests[c.request_id] for c in chosen if c.request_id in requests), None)

    def _ordered(self, candidates: Sequence[MigrationCandidate]) -> Sequence[MigrationCandidate]:
        if self._victim is None:
            return candidates
        try:
            return self._victim.choose(candidates)
        except Exception as error:
            # As at a real source: any request may move, and somebody counts it.
            self._host.policy_failed(policy_failed(self._victim, error))
            return candidates

    def _candidates(self, source: Engine, now: int) -> list[MigrationCandidate]:
        """Requests that are `_is_movable` at a source; all are asked, every other report."""
        next_token = source.progress_at(now) + 1
        block_size = source.block_size
        candidates = []
        for request in source.running:
            if (
                request.phase != DECODING
                or request.migration is not None
                or request.inbound is not None
            ):
                continue
            num_tokens = next_token + request.offset
            candidates.append(
                MigrationCandidate(
                    request_id=request.request_id,
                    num_blocks=-(-num_tokens // block_size),
                    num_output_tokens=num_tokens - request.num_prompt,
                    execution_priority=request.execution_priority,
                    predicted_output_tokens=request.predicted,
                    since_migration_s=to_s(now - request.moved) if request.moved >= 0 else None,
                )
            )
        return candidates

    def _report(
        self,
        order: StartMigration,
        request: LiveRequest | None,
        outcome: MigrationOutcome,
        reason: str,
        now: int,
    ) -> None:
        event = _finished(order, request, outcome, reason)
        self._kernel.send(now + self._delay, lambda at: self._host.migration_ended(event, at))

    def _ended(self, move: Move, now: int) -> None:
        """The source's record is terminal."""
        move.end = now
        self._leaving.remove(move.source.index, move)
        request = move.request
        if request.migration is move:
            request.migration = None
        migration = move.migration
        if migration.state is MigrationState.COMMITTED:
            move.outcome = MigrationOutcome.COMMITTED.value
            self._report(move.order, request, MigrationOutcome.COMMITTED, "", now)
            return
        assert migration.abort_reason is not None
        move.outcome = migration.abort_reason.value
        refused = migration.abort_reason is AbortReason.RESERVATION_REJECTED
        outcome = MigrationOutcome.REFUSED if refused else MigrationOutcome.ABORTED
        self._report(move.order, request, outcome, move.outcome.replace("_", " "), now)

    # ---- what the engine says -------------------------------------------------------------

    def request_finished(self, request: LiveRequest, now: int) -> None:
        """A request that is leaving has ended."""
        move = request.migration
        self._tell(move, FinishedAtSource(migration_id=move.migration_id), now)

    def request_preempted(self, request: LiveRequest, now: int) -> None:
        """A request that is leaving was evicted."""
        move = request.migration
        self._tell(move, PreemptedAtSource(migration_id=move.migration_id), now)

    def request_suspended(self, request: LiveRequest, now: int) -> None:
        """No step touches the request any more."""
        move = request.migration
        move.source_blocks, move.source_held = request.num_blocks, request.held
        move.source_progress = (request.computed, request.generated)
        event = RequestSuspended(
            migration_id=move.migration_id,
            num_blocks_to_copy=max(0, request.num_blocks - move.migration.num_blocks_copied),
            num_preemptions=request.num_preemptions,
        )
        self._tell(move, event, now)

    def _tell(self, move: Move, event: SourceEvent, now: int) -> None:
        # It happened at the end of a step: its consequences belong to a later instant.
        self._kernel.send(now + 1, lambda at: self.handle(move, event, at))

    # ---- the table ------------------------------------------------------------------------

    def handle(self, move: Move, event: SourceEvent, now: int) -> None:
        """Something happened at the source, or came from the destination."""
        if move.end >= 0 or not move.source.is_alive:
            return
        if move.leaving.driver.handle(event) and move.migration.is_terminal:
            self._ended(move, now)

    def carry_out(self, move: Move, command: SourceCommand, now: int) -> None:
        """Carry out a command of the table."""
        request = move.request
        match command:
            case ReserveBlocks():
                num_tokens = move.source.progress_at(now) + request.offset + 1
                self._kernel.send(
                    now + self._delay,
                    lambda at: self._reservations.asked(move, command, num_tokens, at),
                )
            case CopyBlocks():
                self._begin_copy(move, command, now)
            case ToDestination():
                self._send(move, command, now)
            case SuspendRequest():
                if command.after_s > 0:
                    at = now + to_ps(command.after_s)
                    self._kernel.send(at, lambda then: self._suspend(move, then))
                else:
                    self._suspend(move, now)
            case ReleaseRequest():
                move.source.release(move.source_blocks, move.source_held, now)
            case ResumeRequest():
                self._resume(move, now)
            case _:
                raise AssertionError(f"no such command: {command}")

    def _suspend(self, move: Move, now: int) -> None:
        request = move.request
        is_wanted = move.end < 0 and move.migration.state is MigrationState.SUSPENDING
        if is_wanted and move.source.is_alive and request.phase == DECODING:
            move.source.suspend(request, now)

    def _resume(self, move: Move, now: int) -> None:
        request = move.request
        if move.is_admitted:
            # The destination died with it before it could say so. The client drops, by position,
            # the tokens that now come again.
            request.computed, request.generated = move.source_progress
            request.num_blocks, request.held = move.source_blocks, move.source_held
            request.num_migrations -= 1
            request.inbound = None
            request.phase = SUSPENDED
            move.is_admitted = False
        if request.phase == SUSPENDED:
            move.source.resume(request, now)
        elif request in move.source.suspending:
            move.source.suspending.remove(request)

    def _begin_copy(self, move: Move, stage: CopyBlocks, now: int) -> None:
        source, destination = move.source, move.destination
        move.num_blocks_copied += stage.num_blocks
        self._send(move, stage, now)
        source.set_copying(1, now)
        destination.set_copying(1, now)
        written = BlocksWritten(
            migration_id=move.migration_id,
            stage=stage.stage,
            num_blocks_total=stage.first_block + stage.num_blocks,
        )

        def end(at: int) -> None:
            source.set_copying(-1, at)
            destination.set_copying(-1, at)
            self._reservations.handle(move, written, at)

        self._kernel.send(now + max(self._delay, self._copy(stage.num_blocks)), end)

    # ---- messages -------------------------------------------------------------------------

    def _send(self, move: Move, message: ToDestination, now: int) -> None:
        self._kernel.send(
            now + self._delay, lambda at: self._reservations.handle(move, message, at)
        )

    def _answer(self, move: Move, message: ToSource, now: int) -> None:
        def come(at: int) -> None:
            # Of a request that has ended at the source the engine has told by itself.
            if move.is_admitted or move.request.phase != ENDED:
                self.handle(move, _filled_in(move, message, at), at)

        self._kernel.send(now + self._delay, come)

    # ---- death ----------------------------------------------------------------------------

    def instance_died(self, engine: Engine, now: int) -> list[MigrationFinished]:
        """An instance is known to be dead; the commits that the scheduler was not told of."""
        untold = []
        for move in self._leaving.of(engine.index):
            move.end = now
            move.outcome = "source_lost"
            if move.is_admitted:
                move.outcome = MigrationOutcome.COMMITTED.value
                untold.append(_finished(move.order, move.request, MigrationOutcome.COMMITTED, ""))
            elif move.request.migration is move:
                move.request.migration = None
            self._leaving.remove(engine.index, move)
            lost = PeerLost(migration_id=move.migration_id, reason="it died", is_dead=True)
            self._reservations.handle(move, lost, now)
        for move in self._leaving.all():
            if move.destination is engine:
                gone = PeerLost(migration_id=move.migration_id, reason="it died", is_dead=True)
                self.handle(move, gone, now)
        return untold


def _filled_in(move: Move, message: ToSource, now: int) -> ToSource:
    """The message, with what the source adds when it comes."""
    if not isinstance(message, BlocksReserved | BlocksCopied):
        return message
    _, step = move.source.step_ahead(now)
    return replace(
        message,
        num_full_blocks_now=_num_full_blocks(move, now),
        num_preemptions=move.request.num_preemptions,
        hand_over_s=hand_over_s(to_s(max(move.source.step_time_ps, step))),
    )


def _num_full_blocks(move: Move, now: int) -> int:
    """Blocks of the request at its source that no step in flight writes to."""
    request, source = move.request, move.source
    if request.phase == DECODING and request.place is move.source:
        return (source.progress_at(now) + request.offset) // source.block_size
    if request.phase == SUSPENDED:
        return request.num_blocks
    return move.migration.num_copyable_blocks


def _is_movable(request: LiveRequest, source: Engine) -> bool:
    return (
        request.place is source
        and request.phase == DECODING
        and request.migration is None
        and request.inbound is None
    )


def _shortest_of_lowest(source: Engine) -> LiveRequest | None:
    """Of what is movable the lowest execution priority, and of that the fewest tokens."""
    found: LiveRequest | None = None
    priority = offset = 0
    for request in source.running:
        if (
            request.phase != DECODING
            or request.migration is not None
            or request.inbound is not None
        ):
            continue
        if (
            found is None
            or request.execution_priority < priority
            or (request.offset < offset and request.execution_priority == priority)
        ):
            found, priority, offset = request, request.execution_priority, request.offset
    return found


def _finished(
    order: StartMigration, request: LiveRequest | None, outcome: MigrationOutcome, reason: str
) -> MigrationFinished:
    return MigrationFinished(
        migration_id=order.migration_id,
        request_id=None if request is None else request.request_id,
        source=order.source,
        destination=order.destination,
        outcome=outcome,
        reason=reason,
    )
