"""One instance of the model: a fake engine and a host that drives both tables by it.

The host does what any host has to: it turns messages and the engine's news into events, drops what
is not current, and carries commands out in order. Work for the engine goes through a queue (the
engine's thread), its answers through another (the host's) and its news of lost requests through a
third, so anything can happen in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from llumsched.core.migration.destination import machine as destination
from llumsched.core.migration.source import machine as source
from llumsched.engine.base import (
    CannotMigrate,
    CopyableBlocks,
    FinalState,
    RequestState,
    SuspendedRequest,
)
from tests.fake_engine.blocks import BlockContent
from tests.fake_engine.engine import FakeEngine
from tests.migration_table.wire import Message, event_of

Wait = source.DeadlineExpired | destination.ReservationExpired


class Network(Protocol):
    def send(self, message: Message) -> None: ...

    def notice(self, request_id: str, instance_id: str, order: tuple[int, int]) -> None:
        """Tell the frontend which instance has the request; the highest order is the latest."""

    def allow_repeats(self, request_id: str) -> None:
        """The frontend drops, by position, tokens of the request that it has already."""

    def admission_fails(self) -> bool: ...


@dataclass(slots=True, kw_only=True)
class Outgoing:
    """A migration at its source, with what the host keeps beside the record."""

    migration: source.Migration
    state: RequestState
    block_ids: list[int] = field(default_factory=list)
    final: FinalState | None = None
    holds_export: bool = True


@dataclass(slots=True, kw_only=True)
class Incoming:
    """A reservation, with what the host keeps beside the record."""

    reservation: destination.Reservation
    state: RequestState | None = None
    final: FinalState | None = None
    stage_content: list[BlockContent] = field(default_factory=list)
    holds_import: bool = False


class Instance:
    """The world runs `engine_work`, `host_work` and `losses`, entry by entry."""

    def __init__(
        self,
        instance_id: str,
        engine: FakeEngine,
        network: Network,
        options: source.MigrationOptions,
    ) -> None:
        self.instance_id = instance_id
        self.engine = engine
        self.alive = True
        self.outgoing: dict[str, Outgoing] = {}
        self.incoming: dict[str, Incoming] = {}
        self.moved_to: dict[str, str] = {}
        self.known_dead: set[str] = set()
        self.engine_work: deque[Callable[[], None]] = deque()
        self.host_work: deque[Callable[[], None]] = deque()
        self.losses: deque[Callable[[], None]] = deque()
        self._network = network
        self._options = options
        engine.on_lost = self._on_lost

    # ---- what the world does to it ----------------------------------------------------------

    def start_migration(self, migration_id: str, request_id: str, to: str) -> bool:
        """Begin to move a request, if the host may."""
        if to in self.known_dead or self._active(request_id) is not None:
            return False
        if any(
            incoming.reservation.request_id == request_id and not incoming.reservation.may_move_on
            for incoming in self.incoming.values()
        ):
            return False
        try:
            state = self.engine.start_export(request_id)
        except CannotMigrate:
            return False
        migration, commands = source.start(
            migration_id=migration_id,
            request_id=request_id,
            source=self.instance_id,
            destination=to,
            num_preemptions=state.num_preemptions,
            options=self._options,
        )
        outgoing = self.outgoing[migration_id] = Outgoing(migration=migration, state=state)
        for command in commands:
            self._execute_outgoing(outgoing, command)
        return True

    def receive(self, message: Message) -> None:
        """Handle a message, whichever side it is for."""
        event = event_of(message)
        if isinstance(event, destination.ReservationEvent):
            self.tell_incoming(event, message)
        elif isinstance(event, source.BlocksReserved | source.BlocksCopied):
            self.engine_work.append(lambda: self._complete_with_progress(event))
        else:
            self.tell_outgoing(event)

    def abort(self, request_id: str) -> None:
        """A client's abort has come here. The engine's thread knows whether the request has."""
        self.engine_work.append(lambda: self._abort_or_forward(request_id))

    def peer_lost(self, peer: str, is_dead: bool) -> None:
        if is_dead:
            self.known_dead.add(peer)
        reason = f"instance {peer} is lost"
        for outgoing in list(self.outgoing.values()):
            migration = outgoing.migration
            if migration.destination == peer:
                self.tell_outgoing(
                    source.PeerLost(
                        migration_id=migration.migration_id, reason=reason, is_dead=is_dead
                    )
                )
        for incoming in list(self.incoming.values()):
            reservation = incoming.reservation
            if reservation.source == peer:
                self.tell_incoming(
                    destination.SourceLost(
                        migration_id=reservation.migration_id, reason=reason, is_dead=is_dead
                    )
                )

    def waits(self) -> list[Wait]:
        """The deadlines that could pass now, as events; tombstones are the world's business."""
        expiries: list[Wait] = []
        for outgoing in self.outgoing.values():
            migration = outgoing.migration
            if source.timeout_s(migration) is not None:
                expiries.append(
                    source.DeadlineExpired(
                        migration_id=migration.migration_id,
                        state=migration.state,
                        stage=migration.stage,
                    )
                )
        for incoming in self.incoming.values():
            reservation = incoming.reservation
            if destination.timeout_s(reservation, destination.ReservationOptions()) is not None:
                expiries.append(
                    destination.ReservationExpired(
                        migration_id=reservation.migration_id,
                        state=reservation.state,
                        stage=reservation.stage,
                    )
                )
        return expiries

    def expire(self, event: Wait) -> None:
        if isinstance(event, source.DeadlineExpired):
            self.tell_outgoing(event)
        else:
            self.tell_incoming(event)

    # ---- source -----------------------------------------------------------------------------

    def tell_outgoing(self, event: source.MigrationEvent) -> None:
        outgoing = self.outgoing[event.migration_id]
        if not source.is_current(outgoing.migration, event):
            return
        was_terminal = outgoing.migration.is_terminal
        outgoing.migration, commands = source.advance(outgoing.migration, event)
        migration = outgoing.migration
        if migration.state is source.MigrationState.COMMITTED and not was_terminal:
            self.moved_to[migration.request_id] = migration.destination
        for command in commands:
            # An abort that is no answer is not repeated with one, so the host sees to it.
            self._execute_outgoing(
                outgoing, command, reliable=isinstance(event, source.RequestAborted)
            )
        if migration.state is source.MigrationState.ABORTED and not was_terminal:
            self.engine_work.append(lambda: self._end_unsuspended_export(outgoing))

    def _execute_outgoing(
        self, outgoing: Outgoing, command: source.MigrationCommand, reliable: bool = False
    ) -> None:
        match command:
            case source.ReserveBlocks():
                self._send_out(outgoing, command, outgoing.state)
            case source.CopyBlocks():
                self.engine_work.append(lambda: self._copy(outgoing, command))
            case source.SuspendRequest():
                self.engine_work.append(lambda: self._suspend(outgoing, command))
            case source.CommitRequest():
                self._send_out(outgoing, command, outgoing.final)
            case source.ReleaseBlocks(side=source.Side.SOURCE):
                self.engine_work.append(lambda: self._end_export(outgoing, self.engine.release))
            case source.ResumeRequest():
                self.engine_work.append(lambda: self._resume(outgoing, command))
            case source.AbortAtDestination():
                self._send_out(outgoing, command, reliable=reliable)
            case _:
                self._send_out(outgoing, command)

    def _send_out(
        self,
        outgoing: Outgoing,
        command: source.MigrationCommand,
        payload: object = None,
        reliable: bool = False,
    ) -> None:
        self._network.send(
            Message(
                sender=self.instance_id,
                receiver=outgoing.migration.destination,
                command=command,
                payload=payload,
                reliable=reliable,
            )
        )

    def _copy(self, outgoing: Outgoing, command: source.CopyBlocks) -> None:
        if outgoing.migration.is_terminal:
            return
        last = command.first_block + command.num_blocks
        content: list[BlockContent] = []
        self.engine.blocks.gather(outgoing.block_ids[command.first_block : last], content)
        self._send_out(outgoing, command, content)

    def _suspend(self, outgoing: Outgoing, command: source.SuspendRequest) -> None:
        if outgoing.migration.is_terminal:
            return

        def tell(future: Future[SuspendedRequest]) -> None:
            if future.exception() is not None:
                return  # the engine says why by itself
            suspended = future.result()
            outgoing.final = suspended.final
            outgoing.block_ids = suspended.blocks.block_ids
            event = source.RequestSuspended(
                migration_id=command.migration_id,
                num_blocks_to_copy=max(0, len(outgoing.block_ids) - command.num_blocks_copied),
                num_preemptions=suspended.blocks.num_preemptions,
            )
            self.host_work.append(lambda: self.tell_outgoing(event))

        self.engine.suspend(command.request_id).add_done_callback(tell)

    def _resume(self, outgoing: Outgoing, command: source.ResumeRequest) -> None:
        request_id = command.request_id
        self._end_export(outgoing, self.engine.resume)
        if command.may_have_decoded and request_id in self.engine.requests:
            # The destination may have announced this move already: it counts, and this outdoes it.
            placement_number = outgoing.state.placement_number
            self.engine.requests[request_id].placement_number = placement_number
            self._network.allow_repeats(request_id)
            self._network.notice(request_id, self.instance_id, (placement_number, 1))

    @staticmethod
    def _end_export(outgoing: Outgoing, end: Callable[[str], None]) -> None:
        if outgoing.holds_export:
            outgoing.holds_export = False
            end(outgoing.migration.request_id)

    def _end_unsuspended_export(self, outgoing: Outgoing) -> None:
        """What is pinned is not needed any more. A suspended request has been seen to before."""
        if outgoing.holds_export:
            request_id = outgoing.migration.request_id
            assert not self.engine.is_suspended(request_id), f"{request_id} is left suspended"
            self._end_export(outgoing, self.engine.resume)

    def _complete_with_progress(self, event: source.BlocksReserved | source.BlocksCopied) -> None:
        """Fill in, on the engine's thread, what the source itself has to add."""
        outgoing = self.outgoing[event.migration_id]
        if outgoing.migration.is_terminal:
            return
        copyable: CopyableBlocks = self.engine.pin_copyable(outgoing.migration.request_id)
        outgoing.block_ids = copyable.block_ids
        complete: source.MigrationEvent
        if isinstance(event, source.BlocksReserved):
            complete = source.BlocksReserved(
                migration_id=event.migration_id,
                num_cached_blocks=event.num_cached_blocks,
                num_full_blocks_now=len(copyable.block_ids),
                num_preemptions=copyable.num_preemptions,
            )
        else:
            complete = source.BlocksCopied(
                migration_id=event.migration_id,
                stage=event.stage,
                num_blocks_total=event.num_blocks_total,
                num_full_blocks_now=len(copyable.block_ids),
                num_preemptions=copyable.num_preemptions,
            )
        self.host_work.append(lambda: self.tell_outgoing(complete))

    def _on_lost(self, request_id: str, what: str) -> None:
        outgoing = self._active(request_id)
        if outgoing is None:
            outgoing = self._left(request_id)
        if outgoing is None:
            return
        kinds: dict[str, type[source.MigrationEvent]] = {
            "finished": source.RequestFinished,
            "aborted": source.RequestAborted,
            "preempted": source.RequestPreempted,
        }
        event = kinds[what](migration_id=outgoing.migration.migration_id)
        self.losses.append(lambda: self.tell_outgoing(event))

    def _active(self, request_id: str) -> Outgoing | None:
        for outgoing in self.outgoing.values():
            if outgoing.migration.request_id == request_id and not outgoing.migration.is_terminal:
                return outgoing
        return None

    def _left(self, request_id: str) -> Outgoing | None:
        """The migration by which the request has left for good."""
        if request_id not in self.moved_to:
            return None
        for outgoing in reversed(list(self.outgoing.values())):
            migration = outgoing.migration
            if (
                migration.request_id == request_id
                and migration.state is source.MigrationState.COMMITTED
            ):
                return outgoing
        return None

    def _abort_or_forward(self, request_id: str) -> None:
        if request_id in self.engine.requests:
            self.engine.abort(request_id)  # `on_lost` tells the migration, if there is one
            return
        left = self._left(request_id)
        if left is not None:
            event = source.RequestAborted(migration_id=left.migration.migration_id)
            self.host_work.append(lambda: self.tell_outgoing(event))

    # ---- destination ------------------------------------------------------------------------

    def tell_incoming(
        self, event: destination.ReservationEvent, message: Message | None = None
    ) -> None:
        migration_id = event.migration_id
        incoming = self.incoming.get(migration_id)
        if incoming is None:
            incoming = Incoming(reservation=destination.absent(migration_id))
        if not destination.is_current(incoming.reservation, event):
            return
        if message is not None:
            self._keep_payload(incoming, message)
        incoming.reservation, commands = destination.advance(incoming.reservation, event)
        if incoming.reservation.state is destination.ReservationState.ABSENT:
            self.incoming.pop(migration_id, None)
        else:
            self.incoming[migration_id] = incoming
        for command in commands:
            self._execute_incoming(incoming, command, message)

    @staticmethod
    def _keep_payload(incoming: Incoming, message: Message) -> None:
        match message.command:
            case source.ReserveBlocks():
                incoming.state = message.payload
            case source.CopyBlocks():
                incoming.stage_content = message.payload
            case source.CommitRequest():
                incoming.final = message.payload

    def _execute_incoming(
        self,
        incoming: Incoming,
        command: destination.ReservationCommand,
        message: Message | None,
    ) -> None:
        match command:
            case destination.AllocateBlocks():
                self.engine_work.append(lambda: self._allocate(incoming, command))
            case destination.ReceiveBlocks():
                self.engine_work.append(lambda: self._write(incoming, command))
            case destination.AdmitRequest():
                self.engine_work.append(lambda: self._admit(incoming, command))
            case destination.FreeBlocks():
                self.engine_work.append(lambda: self._free(incoming))
            case destination.AbortRequest():
                self.abort(command.request_id)
            case _:
                # A tombstone made by an early message does not know its source.
                receiver = message.sender if message else incoming.reservation.source
                self._network.send(
                    Message(sender=self.instance_id, receiver=receiver, command=command)
                )

    def _answer(self, event: destination.ReservationEvent) -> None:
        self.host_work.append(lambda: self.tell_incoming(event))

    def _allocate(self, incoming: Incoming, command: destination.AllocateBlocks) -> None:
        assert incoming.state is not None
        try:
            reserved = self.engine.reserve(incoming.state)
        except CannotMigrate as error:
            self._answer(
                destination.AllocationFailed(migration_id=command.migration_id, reason=str(error))
            )
            return
        incoming.holds_import = True
        self._answer(
            destination.BlocksAllocated(
                migration_id=command.migration_id, num_cached_blocks=reserved.num_cached_blocks
            )
        )

    def _write(self, incoming: Incoming, command: destination.ReceiveBlocks) -> None:
        if not incoming.holds_import:
            return
        last = command.first_block + command.num_blocks
        try:
            block_ids = self.engine.grow(command.request_id, last)
        except CannotMigrate as error:
            self._answer(
                destination.AllocationFailed(migration_id=command.migration_id, reason=str(error))
            )
            return
        self.engine.blocks.scatter(block_ids[command.first_block : last], incoming.stage_content)
        self._answer(
            destination.BlocksWritten(
                migration_id=command.migration_id, stage=command.stage, num_blocks_total=last
            )
        )

    def _admit(self, incoming: Incoming, command: destination.AdmitRequest) -> None:
        assert incoming.final is not None
        assert incoming.state is not None
        if self._network.admission_fails():
            self._answer(
                destination.AdmissionFailed(migration_id=command.migration_id, reason="injected")
            )
            return
        self.engine.commit(command.request_id, incoming.final)
        incoming.holds_import = False
        # It is here again: an abort that comes now is for this instance.
        self.moved_to.pop(command.request_id, None)
        self._network.notice(
            command.request_id, self.instance_id, (incoming.state.placement_number, 0)
        )
        self._answer(destination.RequestAdmitted(migration_id=command.migration_id))

    def _free(self, incoming: Incoming) -> None:
        # Another migration of the same request may hold an import under the same id.
        if incoming.holds_import:
            incoming.holds_import = False
            self.engine.cancel(incoming.reservation.request_id)
