"""Ports of an engine for migration: two small ones, one for each side of a move.

Everything here runs on the engine's own thread, between two of its steps, so each call sees a
consistent scheduler. An *export* is a request that this engine may give away, an *import* one that
it may take over; both are named by the request's id, so an engine has at most one of each for it.

Invariant: every export ends in exactly one of ``release`` and ``resume``, every import in exactly
one of ``commit`` and ``cancel``; afterwards the engine holds no block on the migration's behalf.
Ports know no messages, no states of the protocol and no clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from enum import StrEnum
from typing import Any, Protocol, TypeVar

StateT = TypeVar("StateT")
StateT_co = TypeVar("StateT_co", covariant=True)
StateT_contra = TypeVar("StateT_contra", contravariant=True)
FinalT_contra = TypeVar("FinalT_contra", contravariant=True)
FinalT_co = TypeVar("FinalT_co", covariant=True)
SuspendedT = TypeVar("SuspendedT", bound="SuspendedRequest[Any]")
StagingT_contra = TypeVar("StagingT_contra", contravariant=True)


class Refusal(StrEnum):
    """Why a request cannot move: few and fixed, fit for a metric's label."""

    POOLING = "pooling"
    STREAMING_INPUT = "streaming_input"
    MULTIMODAL = "multimodal"
    PROMPT_EMBEDS = "prompt_embeds"
    KV_CONNECTOR = "kv_connector"
    UNSUPPORTED_ENGINE = "unsupported_engine"
    INCOMPATIBLE = "incompatible"
    UNREACHABLE = "unreachable"
    NOT_HERE = "not_here"
    BEING_MIGRATED = "being_migrated"
    JUST_ARRIVED = "just_arrived"
    PREFILLING = "prefilling"
    NOT_SCHEDULABLE = "not_schedulable"
    TOO_MANY = "too_many"
    NO_ROOM = "no_room"
    NOT_TAKEN_OVER = "not_taken_over"

    @property
    def is_permanent(self) -> bool:
        """True if the reason lies in the request itself, so that asking again is of no use."""
        return self in _PERMANENT


_PERMANENT = frozenset(
    {
        Refusal.POOLING,
        Refusal.STREAMING_INPUT,
        Refusal.MULTIMODAL,
        Refusal.PROMPT_EMBEDS,
        Refusal.KV_CONNECTOR,
        Refusal.UNSUPPORTED_ENGINE,
    }
)


class CannotMigrate(Exception):
    """The request cannot move now; the message is the reason, fit for an operator.

    ``refusal`` is the same for a machine to count and to act on.
    """

    def __init__(self, reason: str, refusal: Refusal = Refusal.NOT_SCHEDULABLE) -> None:
        super().__init__(reason)
        self.refusal = refusal


class CopyableBlocks(Protocol):
    """Blocks of an export, from the request's first on, pinned until the export ends."""

    @property
    def block_ids(self) -> Sequence[int]: ...

    @property
    def num_preemptions(self) -> int: ...


class SuspendedRequest(Protocol[FinalT_co]):
    """A request that no step touches: its last state and all its blocks, the tail included."""

    @property
    def final(self) -> FinalT_co: ...

    @property
    def blocks(self) -> CopyableBlocks: ...


class ReservedBlocks(Protocol):
    """Blocks of an import; the first ``num_cached_blocks`` have their content already."""

    @property
    def block_ids(self) -> Sequence[int]: ...

    @property
    def num_cached_blocks(self) -> int: ...


class KVCache(Protocol[StagingT_contra]):
    """Reading and writing blocks. Callable from any thread, for blocks that no step writes."""

    def gather(self, block_ids: Sequence[int], staging: StagingT_contra) -> None:
        """Copy the blocks into ``staging``."""

    def scatter(self, block_ids: Sequence[int], staging: StagingT_contra) -> None:
        """The inverse of ``gather``, into the blocks named here."""


class SourceEngine(Protocol[StateT_co, SuspendedT]):
    """The engine of an instance that a request leaves.

    ``on_lost(request_id, what)`` hears, on the engine's thread, that the request of an export has
    ``"finished"``, was ``"aborted"`` or was ``"preempted"``. The export stays open.
    """

    on_lost: Callable[[str, str], None]

    def start_export(self, request_id: str) -> StateT_co:
        """Begin to move a running request; returns what the destination needs to reserve room.

        Raises:
            CannotMigrate: if the request cannot move, or is being moved already.
        """

    def pin_copyable(self, request_id: str) -> CopyableBlocks:
        """Pin, besides those pinned before, the blocks that are full and never written again."""

    def suspend(self, request_id: str) -> Future[SuspendedT]:
        """Schedule the request no more; resolves when no step of it is in flight, all pinned.

        The future fails with ``CannotMigrate`` if the request ends first.
        """

    def resume(self, request_id: str) -> None:
        """End the export. The request, if it still lives, goes on here with its KV intact."""

    def release(self, request_id: str) -> None:
        """End the export and forget the request, with no output."""


class DestinationEngine(Protocol[StateT_contra, FinalT_contra]):
    """The engine of an instance at which a request arrives."""

    def reserve(self, state: StateT_contra) -> ReservedBlocks:
        """Open an import: hold blocks for all of the request's tokens.

        Raises:
            CannotMigrate: if there is no room, or if the engine has a request or an import of this
                id; nothing is held then.
        """

    def grow(self, request_id: str, num_blocks: int) -> Sequence[int]:
        """Hold at least ``num_blocks`` blocks; returns the ids of all.

        Raises:
            CannotMigrate: if there is no room. The import stays open.
        """

    def commit(self, request_id: str, final: FinalT_contra) -> None:
        """End the import: decode the request here from now on, as if it had always been here.

        Raises:
            CannotMigrate: if it cannot be taken over; the import is then over and nothing is held.
        """

    def cancel(self, request_id: str) -> None:
        """End the import and free its blocks; nothing if there is none."""


class MigrationEngine(
    SourceEngine[StateT, SuspendedT],
    DestinationEngine[StateT, FinalT_contra],
    Protocol[StateT, SuspendedT, FinalT_contra],
):
    """An engine that can be either side."""
