"""Port of an engine, as its instance sees it, with a smaller one for each side of a move.

Migrator, llumlet and actor are typed against these protocols alone, so they can be imported, and
tested, where neither vLLM nor torch is installed; ``engine.factory`` builds the engine.

A migration's calls run on the engine's own thread, between two of its steps, so each sees a
consistent scheduler. An *export* is a request that this engine may give away, an *import* one that
it may take over; both are named by the request's id, so an engine has at most one of each for it.

Invariant: every export ends in exactly one of ``release`` and ``resume``, every import in exactly
one of ``commit`` and ``cancel``; afterwards the engine holds no block on the migration's behalf.
Ports know no messages, no states of the protocol and no clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from llumsched.core.events import Event
from llumsched.core.load import InstanceLoad, InstanceSpec
from llumsched.core.migration.groups import CacheGroup
from llumsched.core.policy import MigrationCandidate

if TYPE_CHECKING:
    import torch

    from llumsched.engine.transfer.shared_ring import Staging

T = TypeVar("T")

# Of a request without its KV; what is large in it are images and other inputs, as tensors.
MAX_STATE_NUM_BYTES = 256 << 20


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
    NO_ROOM = "no_room"
    PAUSED = "paused"
    GRAMMAR_BACKEND = "grammar_backend"
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


# ---- what travels ---------------------------------------------------------------------------


class RequestState(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the destination needs it to reserve room, before any KV has moved.

    ``request`` is the engine's own form of the request as it was when it arrived, encoded by the
    engine's own encoder (no pickle). ``output_token_ids`` are the scheduler's, since the worker's
    copy lags behind when steps are in flight. ``placement_number`` is that of the move to come.
    Without KV (``has_kv``) nothing is reserved: the request waits for its turn as it did before.
    In ``step_time_s`` it grows by a token, until it is handed over. One that ``has_ended`` is never
    decoded: its blocks go into the destination's prefix cache.
    """

    request: bytes
    output_token_ids: list[int]
    num_preemptions: int
    placement_number: int
    has_kv: bool = True
    step_time_s: float = 0.0
    has_ended: bool = False


class FinalState(msgspec.Struct, frozen=True, kw_only=True):
    """State that is only known once the request is suspended.

    ``output_token_ids`` are all of them; ``num_computed_tokens`` of prompt and output have KV.
    ``generator_state`` is the state of the request's own random generator, if it has a seed.
    ``draft_statistics`` counts its speculative tokens, where the engine reports them by request.
    """

    output_token_ids: list[int]
    num_computed_tokens: int
    generator_state: bytes | None
    draft_statistics: bytes | None = None


# ---- what the ports answer ------------------------------------------------------------------

BlockTables = tuple[list[int], ...]
"""Ids of a request's blocks: a list for each group of the KV cache, by their place in it. Of a live
group, only the blocks that hold the state."""

NO_BLOCK = -1
"""Id of a block that is not there: a sliding window has left it behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyableBlocks:
    """Block ids of an export, from the request's first block on, pinned until it ends.

    ``num_tokens`` of the request are in blocks that nothing writes any more, but for live groups.
    """

    block_ids: BlockTables
    num_tokens: int
    num_preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspendedRequest:
    """A request that no step touches: its last state and all its blocks, the tail included.

    ``suspended_at_s`` is ``time.perf_counter()`` when its last step here was over.
    """

    final: FinalState
    blocks: CopyableBlocks
    suspended_at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservedBlocks:
    """Blocks of an import: the first ``num_cached_blocks``, in the order of the groups, have their
    content already (by prefix caching). ``grammar`` is to be waited for before the commit, if one
    is being compiled."""

    block_ids: BlockTables
    num_cached_blocks: int
    grammar: Future[Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAhead:
    """An engine's next boundary between two steps, as far as it can be guessed.

    The step under way ends in ``ends_in_s``, and the one after it takes about ``step_s``: both 0
    where the engine has nothing to do, or has never had a step like it.
    """

    ends_in_s: float = 0.0
    step_s: float = 0.0


# ---- the ports ------------------------------------------------------------------------------


class KVAccess(Protocol):
    """How a migrator reaches an engine's KV blocks, in whichever process they are.

    A part of a stage is one run of bytes in a slot of staging memory, and one call copies all of
    it. A part has blocks of one group. ``layout`` and ``backend`` are equal where blocks can move;
    ``block_num_bytes`` is the size of a block of each group in a slot.

    ``pins_staging``: the copies are faster from and to memory that is locked for a GPU.
    ``device`` is that of the blocks which this process reaches itself, else the CPU.
    ``copies_on_cores``: they take the cores that the steps compute on.
    Both calls raise ``RuntimeError`` if a worker cannot copy, or is gone.
    """

    @property
    def layout(self) -> str: ...

    @property
    def backend(self) -> str: ...

    @property
    def block_num_bytes(self) -> tuple[int, ...]: ...

    @property
    def pins_staging(self) -> bool: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def copies_on_cores(self) -> bool: ...

    async def gather(self, group: int, block_ids: Sequence[int], staging: Staging) -> float:
        """Copy blocks of a group into ``staging``, which has room for them. No step writes them
        meanwhile.

        Returns:
            the seconds of a core's time that it took of other processes, where it took most.
        """

    async def scatter(self, group: int, block_ids: Sequence[int], staging: Staging) -> float:
        """The inverse of ``gather``, into the blocks named here."""

    def close(self) -> None:
        """Let go of what is held to reach them."""


class SourceEngine(Protocol):
    """The engine of an instance that a request leaves.

    ``on_lost(request_id, what)`` hears, on the engine's thread, that the request of an export has
    ``"finished"``, was ``"aborted"`` or was ``"preempted"``. The export stays open.
    """

    on_lost: Callable[[str, str], None]

    def candidates(self) -> list[MigrationCandidate]:
        """Requests that could move now: they decode, and none was refused a moment ago."""

    def rest(self, request_id: str, refusal: Refusal) -> None:
        """A migration of the request was refused or given up: it is no candidate for a while."""

    def start_export(self, request_id: str) -> RequestState:
        """Begin to move a request; returns what the destination needs to reserve room.

        Raises:
            CannotMigrate: if the request cannot move, or is being moved already; with
                ``Refusal.PREFILLING``, it can after its first token.
        """

    def start_prefix_export(self, request_id: str) -> Future[RequestState]:
        """Begin to copy what is cached of a request that has ended, which is pinned from now on.

        Resolves when no step in flight writes to it. Nothing is suspended in the end, and what was
        pinned stays cached here.

        Raises:
            CannotMigrate: if nothing of it is cached, or it is not of a kind that is found again.
        """

    def await_output(self, request_id: str, num_tokens: int) -> Future[None]:
        """Resolves when the request has so many output tokens, or is gone."""

    def pin_copyable(self, request_id: str) -> CopyableBlocks:
        """Pin, besides those pinned before, the blocks that are full and never written again."""

    def suspend(self, request_id: str) -> Future[SuspendedRequest]:
        """Schedule the request no more; resolves when no step of it is in flight, all pinned.

        The future fails with ``CannotMigrate`` if the request ends first.
        """

    def resume(self, request_id: str) -> None:
        """End the export, if there is one. The request, if it still lives, goes on here with its
        KV intact."""

    def release(self, request_id: str) -> None:
        """End the export, if there is one, and forget the request, with no output."""


class DestinationEngine(Protocol):
    """The engine of an instance at which a request arrives."""

    def reserve(self, state: RequestState) -> ReservedBlocks:
        """Open an import: hold blocks for all of the request's tokens.

        Raises:
            CannotMigrate: if there is no room, or if the engine has a request or an import of this
                id; nothing is held then.
        """

    def grow(self, request_id: str, num_tokens: int) -> BlockTables:
        """Hold blocks for at least ``num_tokens`` tokens; returns the ids of all.

        Raises:
            CannotMigrate: if there is no room. The import stays open.
        """

    def commit(self, request_id: str, final: FinalState) -> None:
        """End the import: decode the request here from now on, as if it had always been here.

        Of one that has ended the blocks stay in the prefix cache, and nothing else.

        Raises:
            CannotMigrate: if it cannot be taken over; the import is then over and nothing is held.
        """

    def await_output(self, request_id: str, num_tokens: int) -> Future[None]:
        """Resolves when the request has so many output tokens, or is gone."""

    def cancel(self, request_id: str) -> None:
        """End the import and free its blocks; nothing if there is none."""


class MigrationEngine(SourceEngine, DestinationEngine, Protocol):
    """An engine that can be either side.

    ``refusal`` is the reason why no request of this engine can move, or ``None``; ``kv`` is its KV
    cache, unless there is such a reason. ``groups`` are the groups of that cache.
    """

    @property
    def refusal(self) -> str | None: ...

    @property
    def groups(self) -> tuple[CacheGroup, ...]: ...

    @property
    def kv(self) -> KVAccess | None: ...

    def fingerprint(self) -> str:
        """Text that must be equal on two instances for a request to move between them."""


class PrefixBlocks(Protocol):
    """Record of the prompt blocks that an engine caches, on its thread."""

    def take(self) -> list[Event]:
        """Changes since the last call, in order."""

    def all(self) -> list[Event]:
        """Everything that is cached, for a listener that knows nothing."""


class EngineSettings(Protocol):
    """How to build an instance's engine; each engine has a class of its own.

    ``engine`` is its name in ``engine.factory``, ``engine_index`` the instance's ZMQ identity.
    """

    @property
    def engine(self) -> str: ...

    @property
    def engine_index(self) -> int: ...


class InstanceEngine(Protocol):
    """The engine of one instance: what its actor and its llumlet ask of it.

    ``call``, ``ping``, ``connect_frontend``, ``disconnect_frontend`` and ``request_shutdown`` are
    safe from any thread, ``run`` and ``close`` are the main thread's; everything else runs on the
    engine's thread, which ``call`` reaches.
    ``prefix_blocks`` is there if it was asked for. ``step_time_s`` is a recent step's.
    """

    @property
    def migration(self) -> MigrationEngine: ...

    @property
    def prefix_blocks(self) -> PrefixBlocks | None: ...

    @property
    def engine_index(self) -> int: ...

    @property
    def step_time_s(self) -> float: ...

    def step_ahead(self) -> StepAhead:
        """The next boundary between two steps; safe from any thread."""

    def spec(self) -> InstanceSpec:
        """Size and limits of the engine, which never change."""

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run ``function`` on the engine's thread, between two steps."""

    def ping(self) -> Callable[[], bool]:
        """Ask the loop for a sign of life; the returned function says whether there was one."""

    def attach(
        self, *, after_step: Callable[[], None], give_up_arrival: Callable[[str], Future[None]]
    ) -> None:
        """Have the llumlet called, before ``run``: after each step, and to end every migration by
        which a request arrives that a frontend resumes here."""

    def run(self) -> None:
        """Serve until shutdown is requested; raises what the engine died of."""

    def request_shutdown(self) -> None:
        """Make ``run`` return after the step under way."""

    def close(self) -> None:
        """Let go of the KV cache; nothing may be copied any more."""

    def request_ids(self) -> tuple[str, ...]:
        """Every request that is here."""

    def abort_requests(self, request_ids: list[str]) -> None:
        """As their clients' aborts."""

    def connect_frontend(self, client_index: int, input_address: str, output_address: str) -> None:
        """Serve a frontend that has joined, and listens there for requests and for outputs; nothing
        if it is served already."""

    def disconnect_frontend(self, client_index: int) -> None:
        """Take in nothing more of a frontend that has joined, once this returns; nothing of any
        other."""

    def abort_client(self, client_index: int) -> list[str]:
        """End every request of a frontend that is gone; returns which they were."""

    def load_has_changed_much(self) -> bool:
        """True if load moved far enough since the last report for another one at once."""

    def read_load(
        self,
        *,
        num_reserved_blocks: int,
        num_migrations_in: int,
        num_migrations_out: int,
        victim_blocks: int | None,
    ) -> InstanceLoad:
        """The load now, and which requests came and ended since the last call."""
