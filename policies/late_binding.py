"""Bind a request to an instance only when the instance has room for its prompt.

A prompt in an engine's queue that does not fit holds up all behind it, while other instances have
room (head-of-line blocking). Llumnix (OSDI '24) makes room by moving requests away from such an
instance; here the prompt never gets into that queue: it waits at the scheduler, where shorter ones
pass it, and one instance is cleared for it meanwhile.

Invariant: nothing starves. The instance that is being cleared is for the first of those that wait:
no other that would have to wait is sent there, and what is too short to wait only if there is no
other instance.

Departures from Llumnix, besides: an instance that has much prompt left to compute is avoided while
another has room, since a prefill stalls whoever comes after; and migration is decided more often,
but what has moved rests for a second.
"""

from dataclasses import dataclass

import numpy as np

from llumsched.core.options import SchedulerOptions
from llumsched.core.params import param
from llumsched.core.policy import ADMIT, Hold, Placement, PolicyBundle, Verdict
from llumsched.core.snapshot import BoolColumn, ClusterSnapshot
from llumsched.core.types import SchedulingRequest
from llumsched.policies._clearing import clearing_row, first_held_long, is_long
from llumsched.policies.freeness_range import FreenessRange
from llumsched.policies.long_context import ClearRoom
from llumsched.policies.low_priority_short import LowPriorityShort

LONG_SHARE = 0.05
LONG_SHARE_DOC = (
    "A prompt of at least this share of the largest instance's blocks waits for room; a shorter "
    "one is dispatched at once."
)
OPTIONS = SchedulerOptions(
    migration_interval_s=0.2,
    migration_settle_s=1.0,
    max_migrations_in=2,
    max_migrations_out=4,
    queue_timeout_s=600.0,
)
"""A request waits here for what it would wait for in an engine's queue, so as long as there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreestWithRoom:
    """The freest of the instances that have room for the prompt and little prompt to compute."""

    long_share: float = param(LONG_SHARE, LONG_SHARE_DOC, above=0, at_most=1)
    max_pending_prefill_tokens: int = param(
        1024,
        "An instance with more prompt tokens still to compute is passed over if another has room.",
        at_least=0,
    )

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        c = cluster.columns
        candidates = cluster.candidates(request)
        among = c.is_accepting if candidates is None else candidates
        among = _narrowed(among, _open_to(request, cluster, self.long_share))
        among = _narrowed(among, c.num_room_blocks >= cluster.demand_blocks(request))
        unstalled = c.num_prefill_tokens_pending <= self.max_pending_prefill_tokens
        among = _narrowed(among, unstalled)
        free = c.num_total_blocks - c.virtual_usage + c.head_of_line_blocks - c.num_waiting_blocks
        score = free / np.maximum(c.num_requests, 1)
        row = cluster.argmax(score, among)
        if row is None:
            return None
        return Placement(
            instance_id=cluster.instance_ids[row],
            reason=f"freeness={score.item(row):.1f}, room for {c.num_room_blocks.item(row):.0f}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomOrWait:
    """Hold a prompt until an instance that is open to it has room; others may pass meanwhile."""

    long_share: float = param(LONG_SHARE, LONG_SHARE_DOC, above=0, at_most=1)

    def admit(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Verdict:
        if not is_long(request, cluster, self.long_share):
            return ADMIT
        c = cluster.columns
        # An idle instance is as cleared as it gets.
        fits = (c.num_room_blocks >= cluster.demand_blocks(request)) | (c.num_requests == 0)
        if cluster.any(fits & _open_to(request, cluster, self.long_share)):
            return ADMIT
        return Hold(reason="no instance has room for the prompt yet", others_may_pass=True)


def _open_to(request: SchedulingRequest, cluster: ClusterSnapshot, long_share: float) -> BoolColumn:
    """Every instance but the one that is being cleared for another request."""
    rows = np.ones(len(cluster), dtype=np.bool_)
    first = first_held_long(cluster, long_share)
    if first is not None and first.request_id != request.request_id:
        clearing = clearing_row(cluster, long_share)
        if clearing is not None:
            rows[clearing] = False
    return rows


def _narrowed(among: BoolColumn, wanted: BoolColumn) -> BoolColumn:
    """Those among them that are wanted, or all if none is."""
    both = among & wanted
    return both if np.count_nonzero(both) else among


def bundle() -> PolicyBundle:
    """For memory-bound load: wait at the scheduler until an instance has room; short ones pass."""
    return PolicyBundle(
        name="late_binding",
        dispatch=FreestWithRoom(),
        migration=ClearRoom(long_share=LONG_SHARE, max_moves=8),
        scaling=FreenessRange(),
        admission=RoomOrWait(),
        victim=LowPriorityShort(),
        options=OPTIONS,
    )
