"""The nouns of scheduling: requests, their priority classes, instance states and roles.

Invariant: every value is frozen, so it can cross from a host to the core and back unchanged.
This module does not know how load is measured (`load`) or what happens to a request (`events`).
"""

from enum import IntEnum, StrEnum

import msgspec
import numpy as np
import numpy.typing as npt


class InstanceState(StrEnum):
    """Life of an instance; it only ever moves forward."""

    BOOTING = "booting"
    SERVING = "serving"
    DRAINING = "draining"
    GONE = "gone"


class InstanceRole(StrEnum):
    """Which phase an instance is meant for; only disaggregating policies look at it."""

    MIXED = "mixed"
    PREFILL = "prefill"
    DECODE = "decode"


class PriorityClass(IntEnum):
    """Scheduling and execution priorities; a higher class goes first.

    Bulk work that nobody waits for is `LOW`: the last to be dispatched and the first to be moved.
    """

    LOW = -1
    NORMAL = 0
    HIGH = 1

    @classmethod
    def parse(cls, name: str) -> "PriorityClass":
        """The class of this name, in any case: what a header says.

        Raises:
            ValueError: there is no such class; the message names those there are.
        """
        try:
            return cls[name.strip().upper()]
        except KeyError:
            known = ", ".join(member.name.lower() for member in cls)
            raise ValueError(f"unknown priority {name!r}; there are: {known}") from None


def priority_class(vllm_priority: int) -> PriorityClass:
    """The class of vLLM's `priority` field, where a *lower* number is served earlier."""
    if vllm_priority < 0:
        return PriorityClass.HIGH
    return PriorityClass.LOW if vllm_priority else PriorityClass.NORMAL


def vllm_priority(priority: PriorityClass) -> int:
    """A value of vLLM's `priority` field that is of this class."""
    return -int(priority)


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """KV blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


class SchedulingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Facts of a request that the scheduler may know; never its text.

    A length of output is in none of the fields: nobody knows it.
    """

    request_id: str
    """Unique among the live requests."""
    num_prompt_tokens: int
    """Tokens of the prompt."""
    max_output_tokens: int | None = None
    """The client's limit on the output; None without one."""
    scheduling_priority: int = PriorityClass.NORMAL
    """`PriorityClass`; orders the dispatch queue."""
    execution_priority: int = PriorityClass.NORMAL
    """`PriorityClass`; buys headroom while the request runs."""
    arrival_s: float = 0.0
    """Arrival on the clock of `cluster.now`."""
    client_id: str | None = None
    """Name of the client, where that is known."""
    session_id: str | None = None
    """The conversation, of this client, that the request is a turn of, where that is known."""
    prefix_hashes: tuple[int, ...] = ()
    """Names of the full KV blocks of the prompt in order, each covering all blocks before it, as
    the engine computes them; empty where no prefix index is kept."""
    predicted_output_tokens: int | None = None
    """Output tokens that the bundle's predictor, or the client, expects."""
    ttft_slo_s: float | None = None
    """Bound on the time to the first token, where the client gave one."""
    tpot_slo_s: float | None = None
    """Bound on the time of each further token, where the client gave one."""

    def num_prompt_blocks(self, block_size: int) -> int:
        """Demand of the request while it queues: the blocks of its prompt."""
        return -(-self.num_prompt_tokens // block_size)

    def with_prediction(self, num_output_tokens: int) -> "SchedulingRequest":
        """A copy with this `predicted_output_tokens`."""
        return msgspec.structs.replace(self, predicted_output_tokens=num_output_tokens)


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """A client's limit of one kind, and what is left of it."""

    limit: int
    """A minute's whole share."""
    remaining: int
    """The most that it may use at once now."""
    reset_s: float
    """Seconds until all of `limit` is there again, if nothing is used."""


class Allowance(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """The quota of a request's client once the request is counted; None where there is no limit.

    Said for the client, and no part of a decision: it equals anything.
    """

    requests: Budget | None = None
    tokens: Budget | None = None

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


class Scores(msgspec.Struct, eq=False):
    """By what a dispatch policy compared instances: a number for each, which nobody changes.

    Said for whoever asks why, and no part of the decision: it equals anything.
    """

    name: str
    """Name of the number, with its unit."""
    instance_ids: tuple[str, ...]
    values: npt.NDArray[np.float64]
    plus: float = 0.0
    """Summand that all of them have besides; it is added when somebody asks."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def of(self, instance_id: str) -> float | None:
        """The score of an instance; None if it was not there, or has no finite one."""
        if instance_id not in self.instance_ids:
            return None
        score = float(self.values[self.instance_ids.index(instance_id)]) + self.plus
        return score if np.isfinite(score) else None
