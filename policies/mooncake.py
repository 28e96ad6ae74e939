"""Mooncake (Qin et al., FAST '25): cache-aware prefill choice, and early rejection.

The conductor picks the prefill instance with the lowest predicted time to first token, where a
cached prefix saves its prefill but may cost a longer queue, and rejects a request early if the
decode load predicted for the moment its prefill ends is over a bound. Departures: an instance uses
its own cache only (Mooncake may also fetch a prefix from another instance's, at a transfer cost);
what leaves the decode pool until then follows from an assumed length of outputs instead of a fitted
decode time.

Invariant: a request is rejected before any of its prefill is computed, or not at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from llumsched.core.params import param
from llumsched.core.policy import ADMIT, Placement, PolicyBundle, Reject, Verdict
from llumsched.core.snapshot import ClusterSnapshot, FloatColumn, PrefixHolders
from llumsched.core.types import SchedulingRequest
from llumsched.policies._pools import PREFILL_SHARE_DOC, prefill_rows, split
from llumsched.policies.after_first_token import AfterFirstToken
from llumsched.policies.disaggregated import HAND_OVER_OPTIONS
from llumsched.policies.distserve import LeastLoadedDecode
from llumsched.policies.prefix_aware import INDEX_BLOCKS


@dataclass(frozen=True, slots=True, kw_only=True)
class Conductor:
    """Send each request where its prefill ends first, cached prefix and queue both counted."""

    prefill_share: float = param(0.5, PREFILL_SHARE_DOC, above=0, at_most=1)

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        among = prefill_rows(cluster, self.prefill_share, cluster.candidates(request))
        ttft_s, holders = _predicted(request, cluster)
        row = cluster.argmin(ttft_s, among)
        if row is None:
            return None
        num_cached = next((num for num, rows in holders if row in rows), 0)
        return Placement(
            instance_id=cluster.instance_ids[row],
            reason=f"prefill ends in {ttft_s.item(row):.2f} s, {num_cached} blocks cached",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyRejection:
    """Reject a request now if the decode pool is predicted to be too full once it gets there."""

    prefill_share: float = param(0.5, PREFILL_SHARE_DOC, above=0, at_most=1)
    max_decode_load: float = param(
        1.0, "Predicted share of the decode pool's capacity above which it is too full.", above=0
    )
    max_batch: int = param(
        128,
        "Requests a decode instance runs within its time per token; its max_num_seqs if lower.",
        at_least=1,
    )
    expected_output_tokens: int = param(
        256, "Output length assumed of requests that decode now.", at_least=1
    )

    def admit(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Verdict:
        c = cluster.columns
        pools = cluster.stable(self, lambda: self._pools(cluster))
        if c.num_requests.dot(pools.is_either) + 1 <= self.max_decode_load * pools.capacity:
            # Not too full even if no request ends until then.
            return ADMIT
        ttft_s, _ = _predicted(request, cluster)
        row = cluster.argmin(ttft_s, split(cluster, self.prefill_share).prefill_rows)
        prefill_ends_s = 0.0 if row is None else ttft_s.item(row)
        # Requests that decode now end evenly over their decode time; those in prefill all arrive.
        decode_s = self.expected_output_tokens * c.decode_step_s
        left = np.maximum(0.0, 1.0 - prefill_ends_s / np.maximum(decode_s, 1e-9))
        staying = (c.num_requests * left).dot(pools.is_decode)
        arriving = c.num_requests.dot(pools.is_prefill) + 1
        load = (staying + arriving) / max(1.0, pools.capacity)
        if load <= self.max_decode_load:
            return ADMIT
        return Reject(
            reason=(
                f"predicted decode load {load:.0%} when its prefill ends is over the bound of "
                f"{self.max_decode_load:.0%}"
            ),
            retry_after_s=max(1.0, min(60.0, float(decode_s.mean()) / 2)),
        )

    def _pools(self, cluster: ClusterSnapshot) -> "_Pools":
        pools = split(cluster, self.prefill_share)
        is_decode = pools.decode.astype(np.float64)
        is_prefill = (pools.prefill & ~pools.decode).astype(np.float64)
        return _Pools(
            is_decode=is_decode,
            is_prefill=is_prefill,
            is_either=is_decode + is_prefill,
            capacity=float(np.minimum(cluster.columns.max_num_seqs, self.max_batch).dot(is_decode)),
        )


class _Pools(NamedTuple):
    """1 for a row of the pool and 0 for another, so that a product sums over the pool."""

    is_decode: FloatColumn
    is_prefill: FloatColumn
    """Rows for prefill alone."""
    is_either: FloatColumn
    capacity: float
    """Requests that the decode pool runs."""


def _predicted(
    request: SchedulingRequest, cluster: ClusterSnapshot
) -> tuple[FloatColumn, Sequence[PrefixHolders]]:
    """Time to first token, a row each, and who has a start of the prompt cached."""

    def predict() -> tuple[FloatColumn, Sequence[PrefixHolders]]:
        c = cluster.columns
        holders = cluster.match_prefix(request)
        num_tokens = c.num_prefill_tokens_pending + request.num_prompt_tokens
        for num_blocks, rows in holders:
            # At least one token is always computed, also of a prompt that is cached to the end.
            at_most = request.num_prompt_tokens - 1
            if cluster.block_size is None:
                num_tokens[rows] -= np.minimum(num_blocks * c.block_size[rows], at_most)
            else:
                num_tokens[rows] -= min(num_blocks * cluster.block_size, at_most)
        ttft_s: FloatColumn = num_tokens * c.prefill_token_s
        ttft_s += c.decode_step_s
        return ttft_s, holders

    return cluster.fresh(("mooncake", request.request_id), predict)


def bundle() -> PolicyBundle:
    """Comparison: cache-aware prefill, early rejection by predicted decode load (Mooncake)."""
    return PolicyBundle(
        name="mooncake",
        dispatch=Conductor(),
        migration=LeastLoadedDecode(),
        admission=EarlyRejection(),
        victim=AfterFirstToken(),
        options=replace(HAND_OVER_OPTIONS, prefix_index_blocks=INDEX_BLOCKS),
    )
