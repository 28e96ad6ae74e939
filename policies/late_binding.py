"""Bind a request to an instance only when the instance has room for its prompt.

A prompt in an engine's queue that does not fit holds up all behind it, while other instances have
room (head-of-line blocking). Llumnix (OSDI '24) makes room by moving requests away from such an
instance; here a long prompt never gets into that queue: it waits at the scheduler, where others
that fit pass it, and one instance is cleared for it meanwhile.

Where there is room, it matters who is near. A long prompt stalls whatever decodes beside it, and a
short answer feels it most, so the instance with the most room is kept for long prompts while
another is free enough. What is not long prefers an instance where those that run have room to grow;
once many wait, it waits for one: to fill instances to the brim trades waiting for preemption.

Invariant: nothing starves. The instance with the most room is for the first of those that wait: no
other is sent there while there is another instance.

Departures from Llumnix, besides: an instance that has much prompt left to compute is avoided while
another has room, and several requests may leave an instance at a time.
"""

from dataclasses import dataclass

import numpy as np

from llumsched.core.options import SchedulerOptions
from llumsched.core.params import param
from llumsched.core.policy import ADMIT, Hold, Placement, PolicyBundle, Verdict
from llumsched.core.snapshot import BoolColumn, ClusterSnapshot, FloatColumn
from llumsched.core.types import SchedulingRequest
from llumsched.policies._clearing import LONG_SHARE_DOC, clearing_row, is_long
from llumsched.policies.freeness import free_blocks
from llumsched.policies.freeness_range import FreenessRange
from llumsched.policies.long_context import ClearRoom
from llumsched.policies.low_priority_short import LowPriorityShort

LONG_SHARE = 0.05
GROWTH_TOKENS = 32
GROWTH_DOC = (
    "Tokens by which a prompt that is not long leaves each request of its instance to grow."
)
OPTIONS = SchedulerOptions(
    migration_interval_s=0.2,
    migration_settle_s=0.0,
    max_migrations_in=2,
    max_migrations_out=4,
    queue_timeout_s=600.0,
)
"""A request waits here for what it would wait for in an engine's queue, so as long as there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreestWithRoom:
    """Long prompts to the most room, others to the freest that has room and is not kept clear."""

    long_share: float = param(LONG_SHARE, LONG_SHARE_DOC, above=0, at_most=1)
    growth_tokens: int = param(GROWTH_TOKENS, GROWTH_DOC, at_least=0)
    kept_clear: float = param(
        0.8,
        "The instance with the most room, which the next long prompt will take, counts as less "
        "free by this share to others, while another is free enough.",
        at_least=0,
        at_most=1,
    )
    enough_freeness: float = param(10.0, "Above this freeness an instance is free enough.")
    max_pending_prefill_tokens: int = param(
        1024,
        "An instance with more prompt tokens still to compute is passed over if another has room.",
        at_least=0,
    )

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        c = cluster.columns
        demand = cluster.demand_blocks(request)
        is_long_one = is_long(request, cluster, self.long_share)
        candidates = cluster.candidates(request)
        among = c.is_accepting if candidates is None else candidates
        open_to = _open_to(request, cluster)
        if open_to is not None:
            among = _narrowed(among, open_to)
        among = _narrowed(among, c.num_room_blocks >= demand)
        if not is_long_one:
            growth = _growth_blocks(cluster, self.growth_tokens)
            among = _narrowed(among, c.num_room_blocks >= demand + growth)
        unstalled = c.num_prefill_tokens_pending <= self.max_pending_prefill_tokens
        among = _narrowed(among, unstalled)
        if is_long_one:
            score, name = c.num_room_blocks, "room"
        else:
            score, name = self._freeness(request, cluster, among), "freeness"
        row = cluster.argmax(score, among)
        if row is None:
            return None
        return Placement(
            instance_id=cluster.instance_ids[row],
            reason=f"{name}={score.item(row):.1f}, {c.num_room_blocks.item(row):.0f} blocks free",
        )

    def _freeness(
        self, request: SchedulingRequest, cluster: ClusterSnapshot, among: BoolColumn
    ) -> FloatColumn:
        """Freeness over the whole queue, less on the instance that is kept clear."""
        c = cluster.columns
        free = free_blocks(request, cluster) + c.head_of_line_blocks - c.num_waiting_blocks
        score: FloatColumn = free / np.maximum(c.num_requests, 1)
        roomiest = cluster.argmax(c.num_room_blocks, c.is_accepting)
        if roomiest is not None and score[roomiest] > 0:
            others = among.copy()
            others[roomiest] = False
            if (others & (score >= self.enough_freeness)).any():
                score[roomiest] *= 1 - self.kept_clear
        return score


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomOrWait:
    """Hold a prompt until an instance that is open to it has room; others may pass meanwhile."""

    long_share: float = param(LONG_SHARE, LONG_SHARE_DOC, above=0, at_most=1)
    growth_tokens: int = param(GROWTH_TOKENS, GROWTH_DOC, at_least=0)
    crowded_above: int = param(
        4, "While more requests than this wait, those that are not long wait too.", at_least=0
    )

    def admit(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Verdict:
        c = cluster.columns
        demand = cluster.demand_blocks(request)
        if not is_long(request, cluster, self.long_share):
            if len(cluster.held()) <= self.crowded_above:
                return ADMIT
            demand = demand + _growth_blocks(cluster, self.growth_tokens)
        # An idle instance is as cleared as it gets.
        fits = (c.num_room_blocks >= demand) | (c.num_requests == 0)
        open_to = _open_to(request, cluster)
        if cluster.any(fits if open_to is None else fits & open_to):
            return ADMIT
        return Hold(reason="no instance has room for the prompt yet", others_may_pass=True)


def _growth_blocks(cluster: ClusterSnapshot, growth_tokens: int) -> FloatColumn:
    """Blocks that the requests of each instance may still need."""
    c = cluster.columns
    block_size = cluster.block_size
    if block_size is not None:
        return c.num_requests * float(-(-growth_tokens // block_size))
    growth: FloatColumn = -(-growth_tokens // c.block_size) * c.num_requests
    return growth


def _open_to(request: SchedulingRequest, cluster: ClusterSnapshot) -> BoolColumn | None:
    """Every instance but the one that the first of those that wait will take; None means all."""
    held = cluster.held()
    if not held or held[0].request_id == request.request_id:
        return None
    row = clearing_row(cluster, long_share=0.0)
    if row is None:
        return None
    rows = np.ones(len(cluster), dtype=np.bool_)
    rows[row] = False
    return rows


def _narrowed(among: BoolColumn, wanted: BoolColumn) -> BoolColumn:
    """The wanted rows among them, or all if none is wanted."""
    both = among & wanted
    return both if np.count_nonzero(both) else among


def bundle() -> PolicyBundle:
    """For memory-bound load: wait at the scheduler until an instance has room; others pass."""
    return PolicyBundle(
        name="late_binding",
        dispatch=FreestWithRoom(),
        migration=ClearRoom(
            long_share=LONG_SHARE, source_below=3.0, destination_above=3.0, max_moves=8
        ),
        scaling=FreenessRange(),
        admission=RoomOrWait(),
        victim=LowPriorityShort(),
        options=OPTIONS,
    )
