"""For batch work and data generation: fewer instances, each well filled.

The opposite of balancing: decode throughput of an instance rises with its batch, so work is packed
up to a target and half-empty instances are emptied (bin packing with a bound, as cluster managers
do: Tetris, SIGCOMM '14; the bound on preemption follows vLLM's recompute cost).

Invariant: packing stops at the target, so a packed instance keeps room to decode into.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from llumsched.core.options import SchedulerOptions
from llumsched.core.params import param
from llumsched.core.policy import (
    ADMIT,
    Hold,
    MigrationPair,
    Placement,
    PolicyBundle,
    ScaleDown,
    ScaleUp,
    Verdict,
)
from llumsched.core.snapshot import AnyColumn, BoolColumn, ClusterSnapshot, FloatColumn
from llumsched.core.types import SchedulingRequest, Scores
from llumsched.policies.low_priority_short import LowPriorityShort

TARGET_DOC = "Share of an instance's KV blocks up to which it is filled."


@dataclass(frozen=True, slots=True, kw_only=True)
class FillTarget:
    """Send each request to the fullest instance that stays within the target with it."""

    target_kv_usage: float = param(0.85, TARGET_DOC, above=0, at_most=1)
    target_batch: float = param(
        0.9, "Share of an instance's max_num_seqs up to which it is filled.", above=0, at_most=1
    )

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        c = cluster.columns
        candidates = cluster.candidates(request)
        left = c.num_room_blocks - cluster.demand_blocks(request)
        if request.predicted_output_tokens is not None:
            left = np.minimum(left, c.num_total_blocks - c.predicted_final_blocks)
        reserve, max_batch, share = cluster.stable(self, lambda: self._limits(cluster))
        share_left = left * share
        within = left >= reserve
        if candidates is not None:
            within &= candidates
        row = cluster.argmin(share_left, within)
        if row is not None and c.num_requests[row] >= max_batch[row]:
            # Batches are full far more rarely than blocks are, so they are looked at only now.
            row = cluster.argmin(share_left, within & (c.num_requests < max_batch))
        reason = "the fullest within the target"
        if row is None:
            row = cluster.argmax(share_left, candidates)
            reason = "all are past the target; the emptiest"
        if row is None:
            return None
        return Placement(
            instance_id=cluster.instance_ids[row],
            reason=f"{reason}: KV usage {1 - share_left.item(row):.0%} with it",
            scores=Scores("share left with it", cluster.instance_ids, share_left),
        )

    def _limits(self, cluster: ClusterSnapshot) -> tuple[AnyColumn, AnyColumn, AnyColumn]:
        c = cluster.columns
        reserve = (1 - self.target_kv_usage) * c.num_total_blocks
        return reserve, self.target_batch * c.max_num_seqs, 1 / c.num_total_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class PreemptionBound:
    """Hold a request while every instance would soon preempt because of it."""

    growth_tokens: int = param(
        64,
        "Tokens of growth each running request is granted; where lengths are predicted, "
        "the prediction is used instead.",
        at_least=0,
    )

    def admit(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Verdict:
        # Nearly always the instance with the most room is enough to say yes.
        roomiest = cluster.argmax(cluster.columns.num_room_blocks, cluster.candidates(request))
        if roomiest is not None and self._has_room(request, cluster, roomiest):
            return ADMIT
        if cluster.any(self._has_room(request, cluster, slice(None))):
            return ADMIT
        # An empty instance takes anything: holding it longer would not make more room.
        if cluster.any(cluster.columns.num_requests == 0):
            return ADMIT
        return Hold(reason="every instance would have to preempt")

    def _has_room(
        self, request: SchedulingRequest, cluster: ClusterSnapshot, rows: int | slice
    ) -> BoolColumn:
        """True if these rows, or this one, can take the request and let all they run grow."""
        c = cluster.columns
        growth_blocks = -(-self.growth_tokens // c.block_size[rows])
        demand = -(-request.num_prompt_tokens // c.block_size[rows]) + growth_blocks
        if request.predicted_output_tokens is None:
            granted = growth_blocks * c.num_requests[rows]
        else:
            granted = np.maximum(c.predicted_final_blocks[rows] - c.num_used_blocks[rows], 0)
        has_room: BoolColumn = c.num_room_blocks[rows] - granted >= demand
        return has_room


@dataclass(frozen=True, slots=True, kw_only=True)
class Consolidate:
    """Empty the emptiest instance into the fullest ones that still have room for its work."""

    empty_below: float = param(
        0.4, "An instance with less of its KV blocks in use is emptied.", at_least=0, at_most=1
    )
    target_kv_usage: float = param(0.85, TARGET_DOC, above=0, at_most=1)

    def rebalance(self, cluster: ClusterSnapshot) -> Iterable[MigrationPair]:
        c = cluster.columns
        usage = c.num_used_blocks / c.num_total_blocks
        draining = c.is_draining & c.is_fresh & (c.num_requests > 0)
        for row in np.flatnonzero(draining).tolist():
            yield from self._empty(row, usage, c.is_accepting, cluster)
        busy = c.is_accepting & (c.num_running > 0)
        source = cluster.argmin(usage, busy & (usage < self.empty_below))
        if source is not None:
            # Only onto fuller ones: the emptiest of all is never filled, so work does not circle.
            fuller = busy & (usage >= usage[source])
            fuller[source] = False
            used = c.num_used_blocks.item(source)
            if self._room(cluster, fuller).sum() >= used:
                yield from self._empty(source, usage, fuller, cluster)

    def _room(self, cluster: ClusterSnapshot, among: BoolColumn) -> FloatColumn:
        c = cluster.columns
        limit = self.target_kv_usage * c.num_total_blocks
        room = limit - (c.num_total_blocks - c.num_room_blocks)
        result: FloatColumn = np.where(among, np.maximum(room, 0), 0)
        return result

    def _empty(
        self, source: int, usage: np.ndarray, among: BoolColumn, cluster: ClusterSnapshot
    ) -> Iterable[MigrationPair]:
        victim_blocks = cluster.columns.victim_blocks[source]
        room = self._room(cluster, among)
        destination = cluster.argmax(usage, among & (room >= max(1, victim_blocks)))
        if destination is not None and destination != source:
            yield MigrationPair(
                source=cluster.instance_ids[source],
                destination=cluster.instance_ids[destination],
                reason=f"consolidate: KV usage {usage[source]:.0%} -> {usage[destination]:.0%}",
                balances=False,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SpareInstances:
    """Grow while requests are held; drain an instance that runs nothing."""

    num_spare: int = param(0, "Empty instances to keep.", at_least=0)

    def scale(self, cluster: ClusterSnapshot) -> ScaleUp | ScaleDown | None:
        c = cluster.columns
        held = cluster.held()
        if held and not cluster.num_booting:
            return ScaleUp(num_instances=1, reason=f"{len(held)} requests are held")
        spare = np.flatnonzero(c.is_accepting & (c.num_requests == 0))
        if not held and len(spare) > self.num_spare:
            return ScaleDown(
                instance_id=cluster.instance_ids[int(spare[-1])], reason="it runs nothing"
            )
        return None


def bundle() -> PolicyBundle:
    """For batch work: fill instances to a target, consolidate, admit by a bound on preemption."""
    return PolicyBundle(
        name="throughput",
        dispatch=FillTarget(),
        migration=Consolidate(),
        scaling=SpareInstances(),
        admission=PreemptionBound(),
        victim=LowPriorityShort(),
        options=SchedulerOptions(migration_interval_s=1.0),
    )
