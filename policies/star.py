"""STAR (HPDC 2026, arXiv 2510.13668): decodes are rescheduled by the load that is to come.

Each request's remaining output is predicted anew while it decodes, and from it the KV of every
instance `horizon_s` from now: what decodes on grows by a token a step, what ends by then is gone.
Where that is most and where it is least exchange one request, the one after whose move the greater
of the two is smallest, if it gets smaller by a share of the cache that is worth a move.

Departures: lengths follow from the survival of each client's outputs (`hazard_rate`) instead of a
model that reads hidden states; prefill and decode share instances, so dispatch is to the fewest
blocks in use and waited for; of a large pool only the fullest and the emptiest instances by today's
use are looked at. Invariant: a move makes the greater of the two loads to come smaller.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llumsched.core.options import SchedulerOptions
from llumsched.core.params import param
from llumsched.core.policy import MigrationPair, PolicyBundle
from llumsched.core.request_columns import RequestColumns
from llumsched.core.snapshot import ClusterSnapshot, FloatColumn
from llumsched.policies.freeness import Freeness
from llumsched.policies.hazard_rate import HazardRate
from llumsched.policies.low_priority_short import LowPriorityShort


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedLoadPairs:
    """Even out the KV that instances are predicted to hold a while from now."""

    horizon_s: float = param(5.0, "How far ahead load is predicted, in seconds.", above=0)
    max_pairs: int = param(4, "Pairs of instances looked at in a decision.", at_least=1)
    min_gain: float = param(
        0.02, "Share of the KV cache by which a move must lower the greater load.", at_least=0
    )

    def rebalance(self, cluster: ClusterSnapshot) -> Iterator[MigrationPair]:
        c = cluster.columns
        sources = np.flatnonzero(
            (c.is_accepting | (c.is_draining & c.is_fresh)) & (c.num_running > 0)
        )
        takers = np.flatnonzero(c.is_accepting)
        usage = c.num_used_blocks + c.num_waiting_blocks
        usage = usage / c.num_total_blocks
        fullest = sources[np.argsort(-usage[sources], kind="stable")][: self.max_pairs]
        emptiest = takers[np.argsort(usage[takers], kind="stable")][: self.max_pairs]
        loads: dict[int, _Load] = {}
        for row in {*fullest.tolist(), *emptiest.tolist()}:
            loads[row] = self._load(cluster, row)
        givers = sorted(fullest.tolist(), key=lambda r: (not c.is_draining[r], -loads[r].share, r))
        receivers = sorted(emptiest.tolist(), key=lambda r: (loads[r].share, r))
        for giver, taker in list(zip(givers, receivers, strict=False))[: self.max_pairs]:
            if giver != taker:
                yield from self._pair(cluster, loads[giver], loads[taker])

    def _load(self, cluster: ClusterSnapshot, row: int) -> "_Load":
        c = cluster.columns
        requests = cluster.requests_on(cluster.instance_ids[row])
        num_steps = self.horizon_s / max(c.decode_step_s.item(row), 1e-4)
        left = np.nan_to_num(requests.num_remaining_tokens, nan=np.inf)
        stays = left > num_steps
        tokens = np.where(stays, requests.num_computed_tokens + num_steps, 0.0)
        # What is not in the batch yet will be there with its prompt.
        tokens = np.where(requests.is_running, tokens, requests.num_prompt_tokens)
        blocks: FloatColumn = tokens / c.block_size.item(row)
        share = float(blocks.sum()) / c.num_total_blocks.item(row)
        return _Load(row=row, requests=requests, blocks=blocks, share=share)

    def _pair(
        self, cluster: ClusterSnapshot, giver: "_Load", taker: "_Load"
    ) -> Iterator[MigrationPair]:
        c = cluster.columns
        movable = giver.requests.is_decoding & (giver.blocks > 0)
        movable &= giver.blocks < c.num_free_blocks.item(taker.row)
        if not movable.any():
            return
        there = giver.blocks / c.num_total_blocks.item(taker.row)
        here = giver.blocks / c.num_total_blocks.item(giver.row)
        after = np.maximum(giver.share - here, taker.share + there)
        after[~movable] = np.inf
        best = int(after.argmin())
        drains = bool(c.is_draining[giver.row])
        if drains or giver.share - after[best] > self.min_gain:
            yield MigrationPair(
                source=cluster.instance_ids[giver.row],
                destination=cluster.instance_ids[taker.row],
                request_id=giver.requests.requests[best].request_id,
                reason=(
                    f"KV in {self.horizon_s:g} s {giver.share:.0%} and {taker.share:.0%}, "
                    f"{after[best]:.0%} at most after it"
                ),
                balances=False,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """Requests that one instance is predicted to hold, and their blocks."""

    row: int
    requests: RequestColumns
    blocks: FloatColumn
    """Of each request, then."""
    share: float
    """Of its KV cache, then."""


def bundle() -> PolicyBundle:
    """Comparison: decodes move by the predicted load, lengths predicted as they decode (STAR)."""
    return PolicyBundle(
        name="star",
        dispatch=Freeness(queue="whole", room_first=False, growth_weight=0.0),
        migration=PredictedLoadPairs(),
        victim=LowPriorityShort(),
        predictor=HazardRate(),
        options=SchedulerOptions(follow_requests=True, migration_settle_s=1.0),
    )
