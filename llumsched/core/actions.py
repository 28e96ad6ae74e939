"""Everything the global scheduler can ask of its host, as frozen imperative values.

Invariant: an action names its reason, so a host can log and count without knowing any policy.
This module does not know how an action is carried out.
"""

from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from llumsched.core.types import Allowance, InstanceRole


class DispatchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Send a request to an instance.

    A second one for the same id follows the loss of the first instance: the frontend sends prompt
    and delivered tokens again. A prediction goes along for the instance's victim policy.
    """

    request_id: str
    instance_id: str
    reason: str
    predicted_output_tokens: int | None = None
    allowance: Allowance | None = None


class Rejection(StrEnum):
    """Side at fault for a rejection, so that a host can say so in its protocol."""

    OVERLOADED = "overloaded"
    CLIENT_LIMIT = "client_limit"
    TOO_LONG = "too_long"


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectRequest:
    """Answer a request with an error; the scheduler has forgotten it."""

    request_id: str
    reason: str
    retry_after_s: float | None = None
    rejection: Rejection = Rejection.OVERLOADED
    allowance: Allowance | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StartMigration:
    """Move one request from source to destination; without a `request_id` the source picks it.

    A request that came by a migration less than `settle_s` ago stays where it is. Of one that
    `has_ended`, about `num_bytes` that the source has cached are copied, for the next turn of its
    session.
    """

    migration_id: str
    source: str
    destination: str
    request_id: str | None
    reason: str
    settle_s: float = 0.0
    expected_win_s: float | None = None
    expected_cost_s: float | None = None
    """Both as the policy that proposed it told them, in seconds that requests wait."""
    has_ended: bool = False
    num_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RefuseMigration:
    """Answer to a `MigrationRequested` that cannot be done."""

    request_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchInstance:
    """Start one more instance and answer with `InstanceJoined` or `LaunchFailed`."""

    launch_id: str
    reason: str
    role: InstanceRole = InstanceRole.MIXED


@dataclass(frozen=True, slots=True, kw_only=True)
class TerminateInstance:
    """Stop an instance, then tell `InstanceLost`."""

    instance_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFailed:
    """A policy raised or answered nonsense; the built-in choice was used for that decision."""

    policy: str
    error: str
    frames: tuple[tuple[str, int, str], ...] = field(default=(), compare=False)
    """Where it raised: (file, line, function), the innermost last; none of an answer that is wrong.
    The same failure read from a log of another machine is still the same."""


Action = (
    DispatchRequest
    | RejectRequest
    | StartMigration
    | RefuseMigration
    | LaunchInstance
    | TerminateInstance
    | PolicyFailed
)
