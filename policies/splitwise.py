"""Splitwise (Patel et al., ISCA '24): prompt pool, token pool, and a mixed pool between them.

Join the shortest queue, in pending tokens; when the prompt pool's queues are past a threshold, the
mixed pool takes prompts and serves them to the end, and after it the token pool is pulled in. The
same backwards for decodes. Departures: the pools are slices in the order of ids rather than
machines that are re-labelled, so a machine returns from the mixed pool by itself; and the token
machine is chosen when the prompt is done, not when it arrives.

Invariant: the token pool computes prompts only when prompt and mixed pool are both past the
threshold.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from llumsched.core.params import param
from llumsched.core.policy import MigrationPair, Placement, PolicyBundle
from llumsched.core.snapshot import BoolColumn, ClusterSnapshot
from llumsched.core.types import SchedulingRequest
from llumsched.policies._pools import PREFILL_SHARE_DOC, drain, hand_over, split
from llumsched.policies.after_first_token import AfterFirstToken
from llumsched.policies.disaggregated import HAND_OVER_OPTIONS

MIXED_SHARE_DOC = "Share of the instances in the mixed pool, taken from both sides of the split."


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreePools:
    """Send each request to the prompt pool; past a threshold to the mixed, then the token pool."""

    prefill_share: float = param(0.5, PREFILL_SHARE_DOC, above=0, at_most=1)
    mixed_share: float = param(0.25, MIXED_SHARE_DOC, at_least=0, at_most=1)
    queue_threshold_tokens: int = param(
        8192, "Pending prompt tokens past which a queue counts as too long.", at_least=0
    )

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        pending = cluster.columns.num_prefill_tokens_pending
        candidates = cluster.candidates(request)
        pools = _pools(cluster, self.prefill_share, self.mixed_share)
        shortest: tuple[int, str] | None = None
        for pool, name in zip(pools, ("prompt", "mixed", "token"), strict=True):
            row = cluster.argmin(pending, pool if candidates is None else pool & candidates)
            if row is None:
                continue
            if pending[row] <= self.queue_threshold_tokens:
                shortest = (row, name)
                break
            if shortest is None:
                shortest = (row, name)
        if shortest is None:
            return None
        row, name = shortest
        return Placement(
            instance_id=cluster.instance_ids[row],
            reason=f"{name} pool, {pending.item(row):.0f} tokens queued",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptToToken:
    """Hand finished prompts to the shortest queue of the token pool, or of the mixed pool."""

    prefill_share: float = param(0.5, PREFILL_SHARE_DOC, above=0, at_most=1)
    mixed_share: float = param(0.25, MIXED_SHARE_DOC, at_least=0, at_most=1)
    full_above: float = param(
        0.95, "A token instance with more of its KV blocks in use gets no more.", above=0, at_most=1
    )

    def rebalance(self, cluster: ClusterSnapshot) -> Iterable[MigrationPair]:
        c = cluster.columns
        prompt, mixed, token = _pools(cluster, self.prefill_share, self.mixed_share)
        room = c.num_free_blocks >= (1 - self.full_above) * c.num_total_blocks
        load = c.num_requests
        yield from drain(cluster, load)
        for pool in (token & room, mixed & room):
            if pool.any():
                yield from hand_over(
                    cluster, sources=prompt, destinations=pool, load=load, reason="prompt done"
                )
                return


def _pools(
    cluster: ClusterSnapshot, prefill_share: float, mixed_share: float
) -> tuple[BoolColumn, BoolColumn, BoolColumn]:
    return cluster.stable(
        ("splitwise", prefill_share, mixed_share),
        lambda: _make_pools(cluster, prefill_share, mixed_share),
    )


def _make_pools(
    cluster: ClusterSnapshot, prefill_share: float, mixed_share: float
) -> tuple[BoolColumn, BoolColumn, BoolColumn]:
    pools = split(cluster, prefill_share)
    both = pools.prefill & pools.decode
    if both.any() or len(cluster) < 3:
        return pools.prefill & ~both, both, pools.decode & ~both
    # The mixed pool lies across the border of the two, in the order of ids.
    num_mixed = min(round(mixed_share * len(cluster)), len(cluster) - 2)
    prompt_rows = np.flatnonzero(pools.prefill)
    token_rows = np.flatnonzero(pools.decode)
    from_prompt = min(num_mixed // 2, len(prompt_rows) - 1)
    from_token = min(num_mixed - from_prompt, len(token_rows) - 1)
    mixed = np.zeros(len(cluster), dtype=np.bool_)
    mixed[prompt_rows[len(prompt_rows) - from_prompt :]] = True
    mixed[token_rows[:from_token]] = True
    return pools.prefill & ~mixed, mixed, pools.decode & ~mixed


def bundle() -> PolicyBundle:
    """Comparison: prompt, token and mixed pools (Splitwise)."""
    return PolicyBundle(
        name="splitwise",
        dispatch=ThreePools(),
        migration=PromptToToken(),
        victim=AfterFirstToken(),
        options=HAND_OVER_OPTIONS,
    )
