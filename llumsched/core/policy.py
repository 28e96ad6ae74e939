"""The protocols a policy implements, and the values it answers with.

A policy is a plain class with one method that takes frozen values and returns frozen values with a
reason. If it is a dataclass, its fields are its parameters (`params`).

Invariant: policies propose, the scheduler arbitrates; a policy that raises or answers nonsense
costs one `PolicyFailed` and the built-in choice is used. Policies may keep state of their own (a
round-robin cursor): a bundle therefore belongs to one scheduler.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import msgspec

from llumsched.core.options import SchedulerOptions
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.core.types import Allowance, InstanceRole, SchedulingRequest, Scores


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Send the request there."""

    instance_id: str
    """One of `cluster.accepting`."""
    reason: str
    """For the decision log: what decided, with its numbers."""
    hand_over_to: str | None = None
    """Move it there once it has produced `after_output_tokens`: a planned hand-over. It begins with
    a migration decision, so only in a bundle that migrates and that has
    `SchedulerOptions.follow_requests`; if the instance cannot take it by then, it stays."""
    after_output_tokens: int = 1
    """Output tokens that `hand_over_to` waits for."""
    scores: Scores | None = None
    """By what the instances were compared, for whoever asks why it was this one."""


@runtime_checkable
class DispatchPolicy(Protocol):
    """Where a request goes. None holds it, and those behind it, until something changes; a `Hold`
    says why, and may let others pass."""

    def dispatch(
        self, request: SchedulingRequest, cluster: ClusterSnapshot
    ) -> "Placement | Hold | None":
        """Choose an instance among `cluster.accepting`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationPair:
    """Move one request (or up to `num_requests`) from source to destination; the source picks.

    A pair that `balances` is dropped if the move would only swap the roles of the two. Set it to
    False where evening out load is not the aim: a hand-over from prefill to decode, consolidation,
    clearing room for a long prompt.

    A policy that looks at the requests of an instance (`ClusterSnapshot.requests_on`) may name the
    one to move. The source is free to refuse: it may have ended, or be moving already.
    """

    source: str
    """Instance that gives a request away."""
    destination: str
    """Instance that takes it in: serving, and not the source."""
    reason: str
    """For the decision log: what decided, with its numbers."""
    num_requests: int = 1
    """Most requests to move at once."""
    balances: bool = True
    """True if evening out load is the aim."""
    request_id: str | None = None
    """The request to move; None leaves the choice to the source's victim policy."""
    expected_win_s: float | None = None
    """Seconds of waiting that the move is expected to save, for the decision log."""
    expected_cost_s: float | None = None
    """Seconds of waiting that it is expected to cost, for the decision log."""


@runtime_checkable
class MigrationPolicy(Protocol):
    """Which instances should exchange load, best pair first; asked periodically."""

    def rebalance(self, cluster: ClusterSnapshot) -> Iterable[MigrationPair]:
        """Propose pairs; the scheduler drops what slots, cool-downs or conflicts forbid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admit:
    """The request may be dispatched now."""

    allowance: Allowance | None = None
    """The rest of its client's quota, where the client has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """The request waits; later ones may be dispatched before it only if `others_may_pass`."""

    reason: str
    others_may_pass: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """The request is answered with an error now, rather than late."""

    reason: str
    retry_after_s: float | None = None
    is_client_limit: bool = False
    """True if its client's own share is used up (status 429), and not the pool's room (503)."""
    allowance: Allowance | None = None
    """The rest of its client's quota, where the client has one."""


Verdict = Admit | Hold | Reject
ADMIT = Admit()


@runtime_checkable
class AdmissionPolicy(Protocol):
    """Decides if a request is dispatched now, held, or rejected."""

    def admit(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Verdict:
        """Judge one request; asked again at every change while it is held."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleUp:
    """More instances are wanted."""

    num_instances: int
    reason: str
    role: InstanceRole = InstanceRole.MIXED


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleDown:
    """Verdict that an instance can be spared."""

    instance_id: str
    reason: str


@runtime_checkable
class ScalingPolicy(Protocol):
    """Decides if the cluster should grow or shrink; cool-downs and limits are the scheduler's."""

    def scale(self, cluster: ClusterSnapshot) -> ScaleUp | ScaleDown | None:
        """The wish of this moment; the scheduler acts on one that lasts."""


class MigrationCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """A request that could move, as its own instance knows it."""

    request_id: str
    num_blocks: int
    num_output_tokens: int = 0
    execution_priority: int = 0
    predicted_output_tokens: int | None = None
    since_migration_s: float | None = None
    """Seconds since it came here by a migration; None if it never moved."""


@runtime_checkable
class VictimPolicy(Protocol):
    """Which request the source moves first.

    A policy may have an attribute `first_by`, a tuple of field names: as long as no length is
    predicted, its first choice is of all candidates one with the least of these, the earlier ones
    counting first. A host that asks only how large the first is may then look for itself.
    """

    def choose(self, candidates: Sequence[MigrationCandidate]) -> Sequence[MigrationCandidate]:
        """The candidates that may move, best first."""


@runtime_checkable
class LengthPredictor(Protocol):
    """Expected output length of a request; optional, and without one the paper's rules hold.

    One that has a method `predict_remaining(request, num_output_tokens)` is asked again for each
    request that a policy looks at (`ClusterSnapshot.requests_on`), with what it has produced.
    """

    def predict(self, request: SchedulingRequest) -> int | None:
        """Expected output tokens, or None while nothing is known."""

    def observe(self, request: SchedulingRequest, num_output_tokens: int) -> None:
        """Learn from a finished request."""


@runtime_checkable
class Stateful(Protocol):
    """A policy of any kind that remembers: its memory goes into checkpoints of the decision log.

    One that remembers without this works, but replaying a log whose beginning was rotated away may
    part from what was recorded.
    """

    def state(self) -> Any:
        """The memory as JSON values."""

    def restore(self, state: Any) -> None:
        """Go on from `state`; called once, on a new policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyBundle:
    """The policies that work together under one name, and the scheduler options they rely on."""

    name: str
    dispatch: DispatchPolicy
    migration: MigrationPolicy | None = None
    scaling: ScalingPolicy | None = None
    admission: AdmissionPolicy | None = None
    victim: VictimPolicy | None = None
    predictor: LengthPredictor | None = None
    options: SchedulerOptions = field(default_factory=SchedulerOptions)

    def policies(self) -> dict[str, object]:
        """The bundle's policies by kind, without the kinds that are missing."""
        kinds = ("dispatch", "migration", "scaling", "admission", "victim", "predictor")
        return {kind: getattr(self, kind) for kind in kinds if getattr(self, kind) is not None}


def settled(candidates: Sequence[MigrationCandidate], settle_s: float) -> list[MigrationCandidate]:
    """The candidates that did not just move: for the source, before it asks the victim policy."""
    return [
        candidate
        for candidate in candidates
        if candidate.since_migration_s is None or candidate.since_migration_s >= settle_s
    ]
