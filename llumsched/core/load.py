"""Load of one instance: what it is, and what it reports.

Virtual usage and freeness follow from reports, and from what was sent since, by Algorithm 1 of
Llumnix (OSDI '24), in KV blocks; `scheduling.cluster_state` keeps both as columns:

    V(request) = queuing:  head of the line -> its demand;  behind the head -> 0
                 running:  physical usage + headroom[priority] / requests of that priority
                 fake request of a draining instance -> infinity
    freeness   = (M - sum of V) / B          decode steps until full; +inf when empty

Invariant: a report is a value. This module does not know where reports come from, or when one is
stale.
"""

from dataclasses import dataclass

import msgspec

from llumsched.core.step_time import MeasuredStep
from llumsched.core.types import InstanceRole, PriorityClass


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSpec:
    """Properties of an instance that never change while it lives."""

    instance_id: str
    num_total_blocks: int
    block_size: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    role: InstanceRole = InstanceRole.MIXED
    block_num_bytes: int = 0
    """Bytes of KV in a block, over all workers; 0 where that is not known."""


class InstanceLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One load report, pushed by the llumlet of an instance.

    `num_free_blocks` excludes `num_reserved_blocks` (blocks reserved for incoming migrations): in
    vLLM a reservation is an allocation. The two id tuples name what has happened since the previous
    report, received before finished.
    """

    instance_id: str
    sequence: int
    num_total_blocks: int
    num_free_blocks: int
    num_reserved_blocks: int = 0
    num_running: int = 0
    num_waiting: int = 0
    head_of_line_blocks: int = 0
    """Demand of the first waiting request; 0 if none waits."""
    num_waiting_blocks: int = 0
    num_waiting_tokens: int = 0
    num_prefill_tokens_pending: int = 0
    """Prompt tokens not computed yet, of running and waiting requests together."""
    num_prefill_pairs_pending: int = 0
    """Pairs of such a token and a token it attends to: what their attention costs."""
    step_time_s: float = 0.0
    """Duration of a recent ordinary engine step; 0 if none has run."""
    step: MeasuredStep | None = None
    """A step since the last report, with its batch; one with prompts, if there was one."""
    num_running_by_class: tuple[tuple[int, int], ...] = ()
    """(execution priority class, running requests of it) pairs; absent classes count 0."""
    victim_blocks: int | None = None
    """Blocks of the request that would migrate next; None: not known, the mean is used."""
    num_migrations_in: int = 0
    num_migrations_out: int = 0
    num_decode_steps: int = 0
    """Steps with decodes so far: each gives every request that decodes one token."""
    progress: tuple[tuple[str, int, int], ...] = ()
    """(request id, tokens computed, output tokens) of running requests of whom that does not
    follow from the steps since they were told of last, and of evicted ones, which have nothing
    computed; empty where nobody asks."""
    received_request_ids: tuple[str, ...] = ()
    finished_request_ids: tuple[str, ...] = ()

    @property
    def num_used_blocks(self) -> int:
        """Physical usage, reservations for incoming migrations included."""
        return self.num_total_blocks - self.num_free_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Headroom:
    """Blocks kept clear for requests of high execution priority (Llumnix, section 4.4).

    `target_load` is the profiled share of an instance's blocks up to which decode still runs near
    its ideal speed; a high-priority request claims the rest. Default: the paper's 1,600 of 13,616
    tokens.
    """

    target_load: float = 0.12

    def blocks(self, priority: int, num_total_blocks: int) -> float:
        """Headroom of a priority class on an instance, shared by its requests of that class."""
        if priority < PriorityClass.HIGH:
            return 0.0
        return max(0.0, num_total_blocks * (1.0 - self.target_load))
