"""For long prompts beside short ones (retrieval, agents): keep contiguous room, bound the stall.

A long prompt needs many blocks on *one* instance, and its prefill stalls every decode beside it.
Short requests are packed so that some instances keep room; a long prompt that fits nowhere is held
while one instance is cleared by migration, and takes it then. De-fragmentation before admission is
the departure from Llumnix (OSDI '24), which de-fragments once the prompt is stuck in an engine's
queue; the bound on the stall follows Sarathi-Serve (OSDI '24).

Invariant: dispatch, admission and migration agree on the instance being cleared, since all three
find it by `clearing_row` from the same snapshot; short requests are kept off it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from llumsched.core.params import param
from llumsched.core.policy import (
    ADMIT,
    Hold,
    MigrationPair,
    Placement,
    PolicyBundle,
    Verdict,
)
from llumsched.core.snapshot import BoolColumn, ClusterSnapshot
from llumsched.core.types import SchedulingRequest
from llumsched.policies._clearing import LONG_SHARE_DOC, clearing_row, is_long
from llumsched.policies.freeness_pairs import FreenessPairs
from llumsched.policies.freeness_range import FreenessRange
from llumsched.policies.low_priority_short import LowPriorityShort


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLength:
    """Long prompts to the most free blocks, short ones where they leave the most room elsewhere."""

    long_share: float = param(0.2, LONG_SHARE_DOC, above=0, at_most=1)
    pack_freeness: float = param(
        20.0, "Short requests are packed onto an instance while its freeness stays above this."
    )
    max_pending_prefill_tokens: int = param(
        16384,
        "An instance with more prompt tokens still to compute takes a request only if all have.",
        at_least=0,
    )

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        c = cluster.columns
        pending = c.num_prefill_tokens_pending
        candidates = cluster.candidates(request)
        row, reason = self._place(request, cluster, candidates)
        # The choice among all is that among the unstalled too, unless it is stalled itself.
        if row is not None and pending[row] > self.max_pending_prefill_tokens:
            unstalled = pending <= self.max_pending_prefill_tokens
            if candidates is not None:
                unstalled &= candidates
            if np.count_nonzero(unstalled):
                row, reason = self._place(request, cluster, unstalled)
        if row is None:
            return None
        return Placement(
            instance_id=cluster.instance_ids[row],
            reason=f"{reason} ({c.num_free_blocks.item(row):.0f} free)",
        )

    def _place(
        self, request: SchedulingRequest, cluster: ClusterSnapshot, among: BoolColumn | None
    ) -> tuple[int | None, str]:
        c = cluster.columns
        if is_long(request, cluster, self.long_share):
            return cluster.argmax(c.num_room_blocks, among), "long prompt: the most free blocks"
        clearing = clearing_row(cluster, self.long_share)
        if clearing is not None:
            others = c.is_accepting.copy() if among is None else among.copy()
            others[clearing] = False
            among = others if np.count_nonzero(others) else among
        packed = c.freeness > self.pack_freeness
        if among is not None:
            packed &= among
        row = cluster.argmin(c.freeness, packed)
        # The lowest may be infinite: then only empty instances are left to open.
        if row is not None and c.freeness[row] < np.inf:
            return row, "short prompt: packed"
        return cluster.argmax(c.freeness, among), "short prompt: the freest"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomFirst:
    """Hold a long prompt until an instance has room for it; shorter ones may pass meanwhile."""

    long_share: float = param(0.2, LONG_SHARE_DOC, above=0, at_most=1)

    def admit(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Verdict:
        if not is_long(request, cluster, self.long_share):
            return ADMIT
        c = cluster.columns
        room = c.num_room_blocks
        # An idle instance is as cleared as it gets.
        fits = (room >= cluster.demand_blocks(request)) | (c.num_requests == 0)
        if cluster.any(fits):
            return ADMIT
        return Hold(reason="room for a long prompt is being cleared", others_may_pass=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClearRoom:
    """Move decodes off the instance where a held long prompt will go; balance the others."""

    long_share: float = param(0.2, LONG_SHARE_DOC, above=0, at_most=1)
    source_below: float = param(
        10.0, "As in freeness_pairs: less freeness than this gives requests away."
    )
    destination_above: float = param(
        20.0, "As in freeness_pairs: more freeness than this takes requests in."
    )
    max_moves: int = param(4, "Requests moved off the instance at one decision.", at_least=1)

    def rebalance(self, cluster: ClusterSnapshot) -> Iterable[MigrationPair]:
        others = np.ones(len(cluster), dtype=np.bool_)
        clearing = clearing_row(cluster, self.long_share)
        if clearing is not None:
            others[clearing] = False
            yield from self._clear(clearing, cluster)
        balance = FreenessPairs(
            source_below=self.source_below, destination_above=self.destination_above
        )
        yield from balance.pairs(cluster, others)

    def _clear(self, source: int, cluster: ClusterSnapshot) -> Iterable[MigrationPair]:
        c = cluster.columns
        room = c.num_room_blocks
        victim_blocks = max(1, c.victim_blocks.item(source))
        destinations = np.flatnonzero(c.is_accepting & (room >= victim_blocks))
        order = destinations[np.argsort(-room[destinations], kind="stable")]
        num_moves = min(self.max_moves, int(c.num_running[source]))
        for destination in [row for row in order.tolist() if row != source][:num_moves]:
            yield MigrationPair(
                source=cluster.instance_ids[source],
                destination=cluster.instance_ids[destination],
                reason="clears room for a long prompt",
                balances=False,
            )


def bundle() -> PolicyBundle:
    """For long prompts: keep room on some instances, clear it before admission, bound the stall."""
    return PolicyBundle(
        name="long_context",
        dispatch=PromptLength(),
        migration=ClearRoom(),
        scaling=FreenessRange(),
        admission=RoomFirst(),
        victim=LowPriorityShort(),
    )
