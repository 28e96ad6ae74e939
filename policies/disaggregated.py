"""Prefill on one pool, decode on the other, by live migration after the first token.

As DistServe (OSDI '24) splits the phases, with the adaptive lending of Arrow and of DynaServe
(2025): a pool that idles helps the other. Departures: the hand-over is this project's live
migration, so no KV connector is needed and a hand-over that finds no room just does not happen; and
instances keep their role while they help.

Invariant: with both pools busy, prefills go to the prefill pool only and decodes end up in the
decode pool only.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from llumsched.core.options import SchedulerOptions
from llumsched.core.params import param
from llumsched.core.policy import MigrationPair, Placement, PolicyBundle
from llumsched.core.snapshot import BoolColumn, ClusterSnapshot
from llumsched.core.types import SchedulingRequest
from llumsched.policies._pools import PREFILL_SHARE_DOC, Pools, drain, hand_over, split
from llumsched.policies.after_first_token import AfterFirstToken
from llumsched.policies.freeness_range import FreenessRange

LEND_PREFILL_DOC = (
    "Prompt tokens pending on every prefill instance before an idle decode instance helps out."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPool:
    """Send each request to the prefill instance with the fewest prompt tokens pending."""

    prefill_share: float = param(0.5, PREFILL_SHARE_DOC, above=0, at_most=1)
    lend_above_tokens: int = param(8192, LEND_PREFILL_DOC, at_least=0)

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        c = cluster.columns
        pools = split(cluster, self.prefill_share)
        candidates = cluster.candidates(request)
        prefill = pools.prefill if candidates is None else pools.prefill & candidates
        row = cluster.argmin(c.num_prefill_tokens_pending, prefill)
        reason = "prefill pool"
        if row is None or c.num_prefill_tokens_pending[row] > self.lend_above_tokens:
            idle = pools.decode & (c.num_prefill_tokens_pending == 0) & (c.num_waiting == 0)
            if candidates is not None:
                idle &= candidates
            lent = cluster.argmax(c.num_free_blocks, idle)
            if lent is not None and _has_room(request, lent, cluster):
                row, reason = lent, "lent by the decode pool"
        if row is None:
            row = cluster.argmin(c.num_prefill_tokens_pending, candidates)
            reason = "no prefill instance can hold it"
        if row is None:
            return None
        return Placement(
            instance_id=cluster.instance_ids[row],
            reason=f"{reason}, {c.num_prefill_tokens_pending.item(row):.0f} tokens pending",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOver:
    """Move requests from the prefill pool to the freest decode instances after the first token."""

    prefill_share: float = param(0.5, PREFILL_SHARE_DOC, above=0, at_most=1)
    lend_below_freeness: float = param(
        5.0,
        "Decode instances below this freeness get no more; when all are, prefill instances with "
        "nothing pending keep their decodes and take some over.",
    )

    def rebalance(self, cluster: ClusterSnapshot) -> Iterable[MigrationPair]:
        c = cluster.columns
        pools = split(cluster, self.prefill_share)
        yield from drain(cluster, -c.freeness)
        ready = pools.decode & (c.freeness > self.lend_below_freeness)
        if ready.any():
            yield from hand_over(
                cluster,
                sources=pools.prefill,
                destinations=ready,
                load=-c.freeness,
                reason="prefill done",
            )
        else:
            yield from self._lend(pools, cluster)

    def _lend(self, pools: Pools, cluster: ClusterSnapshot) -> Iterable[MigrationPair]:
        c = cluster.columns
        idle: BoolColumn = (
            pools.prefill
            & ~pools.decode
            & (c.num_prefill_tokens_pending == 0)
            & (c.num_waiting == 0)
        )
        destinations = np.flatnonzero(idle & (c.freeness > self.lend_below_freeness))
        destinations = destinations[np.argsort(-c.freeness[destinations], kind="stable")]
        sources = np.flatnonzero(pools.decode & (c.num_running > 0))
        sources = sources[np.argsort(c.freeness[sources], kind="stable")]
        for source, destination in zip(sources.tolist(), destinations.tolist(), strict=False):
            yield MigrationPair(
                source=cluster.instance_ids[source],
                destination=cluster.instance_ids[destination],
                reason="decode pool is full; lent by the prefill pool",
            )


def _has_room(request: SchedulingRequest, row: int, cluster: ClusterSnapshot) -> bool:
    c = cluster.columns
    return request.num_prompt_blocks(int(c.block_size[row])) <= c.num_free_blocks.item(row)


HAND_OVER_OPTIONS = SchedulerOptions(
    # A hand-over is part of every request's path, so it must not wait for a slow rhythm or for one
    # of two slots; and what was handed over is not meant to come back, so nothing has to settle.
    migration_interval_s=0.05,
    max_migrations_in=8,
    max_migrations_out=8,
    migration_settle_s=0.0,
)


def bundle() -> PolicyBundle:
    """For prefill / decode split: two pools, hand-over after the first token, adaptive lending."""
    return PolicyBundle(
        name="disaggregated",
        dispatch=PrefillPool(),
        migration=HandOver(),
        scaling=FreenessRange(),
        victim=AfterFirstToken(),
        options=HAND_OVER_OPTIONS,
    )
