"""What the instances of the model say to each other, and which event each message is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llumsched.core.migration.destination import machine as destination
from llumsched.core.migration.source import machine as source

Command = source.MigrationCommand | destination.ReservationCommand


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A command on its way to the other instance, with what travels along.

    `reliable`: the host would repeat it until it is answered or its receiver is dead.
    """

    sender: str
    receiver: str
    command: Command
    payload: Any = None
    reliable: bool = False


def event_of(message: Message) -> source.MigrationEvent | destination.ReservationEvent:
    """The event that a message is to its receiver. What the source adds to it is left at 0."""
    command = message.command
    migration_id = command.migration_id
    match command:
        case source.ReserveBlocks():
            return destination.ReservationRequested(
                migration_id=migration_id, request_id=command.request_id, source=message.sender
            )
        case source.CopyBlocks():
            return destination.StageAnnounced(
                migration_id=migration_id,
                stage=command.stage,
                first_block=command.first_block,
                num_blocks=command.num_blocks,
            )
        case source.CommitRequest():
            return destination.CommitRequested(
                migration_id=migration_id, num_blocks=command.num_blocks
            )
        case source.QueryCommit():
            return destination.CommitQueried(migration_id=migration_id)
        case source.ReleaseBlocks():
            return destination.ReleaseRequested(migration_id=migration_id)
        case source.AbortAtDestination():
            return destination.AbortRequested(
                migration_id=migration_id, request_id=command.request_id
            )
        case source.CloseMigration():
            return destination.MigrationClosed(migration_id=migration_id)
        case destination.ConfirmReservation():
            return source.BlocksReserved(
                migration_id=migration_id,
                num_cached_blocks=command.num_cached_blocks,
                num_full_blocks_now=0,
                num_preemptions=0,
            )
        case destination.RejectReservation():
            return source.ReservationRejected(migration_id=migration_id, reason=command.reason)
        case destination.ConfirmCopy():
            return source.BlocksCopied(
                migration_id=migration_id,
                stage=command.stage,
                num_blocks_total=command.num_blocks_total,
                num_full_blocks_now=0,
                num_preemptions=0,
            )
        case destination.AcknowledgeCommit():
            return source.CommitAcknowledged(migration_id=migration_id)
        case destination.RefuseCommit():
            return source.CommitRefused(migration_id=migration_id, reason=command.reason)
    raise AssertionError(f"{type(command).__name__} is not a message")
