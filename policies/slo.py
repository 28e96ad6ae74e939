"""For deadlines: place, migrate and reject by predicted time to first token and time per token.

Predictions come from the fitted step-time model (`core.step_time`). Early rejection follows
Mooncake (FAST '25): an error now is worth more than an answer that is late. Departures: the
deadline is the request's own where it names one, and running requests are moved away from a
predicted miss, which needs live migration.

Invariant: nothing is rejected that some instance is predicted to serve in time.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from llumsched.core.params import param
from llumsched.core.policy import (
    ADMIT,
    MigrationPair,
    Placement,
    PolicyBundle,
    Reject,
    Verdict,
)
from llumsched.core.snapshot import ClusterSnapshot, FloatColumn
from llumsched.core.types import SchedulingRequest
from llumsched.policies.freeness_range import FreenessRange
from llumsched.policies.low_priority_short import LowPriorityShort

N = TypeVar("N", float, FloatColumn)

TTFT_DOC = "Time to first token, in seconds, for requests that name no deadline."
TPOT_DOC = "Time per output token, in seconds, for requests that name no deadline."
OUTPUT_DOC = "Output length assumed of running requests, which says how fast blocks come free."


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlineSlack:
    """Send each request where its deadlines leave the most slack."""

    ttft_slo_s: float = param(5.0, TTFT_DOC, above=0)
    tpot_slo_s: float = param(0.15, TPOT_DOC, above=0)
    expected_output_tokens: int = param(256, OUTPUT_DOC, at_least=1)

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        outlook = _outlook(request, cluster, self)
        if outlook is None:
            return None
        return Placement(
            instance_id=cluster.instance_ids[outlook.row],
            reason=(
                f"predicted first token in {outlook.ttft_s:.2f} s, "
                f"then {outlook.tpot_s * 1000:.0f} ms a token"
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlineAdmission:
    """Reject a request at once when no instance can meet its deadlines."""

    ttft_slo_s: float = param(5.0, TTFT_DOC, above=0)
    tpot_slo_s: float = param(0.15, TPOT_DOC, above=0)
    expected_output_tokens: int = param(256, OUTPUT_DOC, at_least=1)
    tolerance: float = param(
        0.2, "Predicted times may exceed a deadline by this share before it counts.", at_least=0
    )

    def admit(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Verdict:
        outlook = _outlook(request, cluster, self)
        if outlook is None or outlook.share <= 1 + self.tolerance:
            return ADMIT
        ttft_slo_s = request.ttft_slo_s or self.ttft_slo_s
        tpot_slo_s = request.tpot_slo_s or self.tpot_slo_s
        return Reject(
            reason=(
                f"no instance can meet the deadlines: predicted first token in "
                f"{outlook.ttft_s:.1f} s (deadline {ttft_slo_s:g} s), "
                f"{outlook.tpot_s * 1000:.0f} ms a token (deadline {tpot_slo_s * 1000:.0f} ms)"
            ),
            retry_after_s=max(1.0, min(60.0, outlook.ttft_s - ttft_slo_s)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlinePairs:
    """Move requests from instances predicted to miss their deadlines to instances with slack."""

    ttft_slo_s: float = param(5.0, TTFT_DOC, above=0)
    tpot_slo_s: float = param(0.15, TPOT_DOC, above=0)
    expected_output_tokens: int = param(256, OUTPUT_DOC, at_least=1)
    destination_share: float = param(
        0.8, "A destination stays within this share of the deadlines.", above=0, at_most=1
    )

    def rebalance(self, cluster: ClusterSnapshot) -> Iterable[MigrationPair]:
        c = cluster.columns
        missing = c.head_of_line_blocks - c.num_free_blocks
        wait_s = _block_wait_s(cluster, missing, self.expected_output_tokens)
        tpot_s = c.decode_step_s
        more_s = cluster.step_time.running_s
        now = np.maximum(tpot_s / self.tpot_slo_s, wait_s / self.ttft_slo_s)
        then = np.maximum((tpot_s + more_s) / self.tpot_slo_s, wait_s / self.ttft_slo_s)
        draining = c.is_draining
        sources = np.flatnonzero(c.is_fresh & (c.num_running > 0) & ((now > 1) | draining))
        sources = sources[np.argsort(np.where(draining, -np.inf, -now)[sources], kind="stable")]
        ready = c.is_accepting & (then <= self.destination_share) & (c.num_free_blocks > 0)
        destinations = np.flatnonzero(ready)
        destinations = destinations[np.argsort(then[destinations], kind="stable")]
        for source, destination in zip(sources.tolist(), destinations.tolist(), strict=False):
            yield MigrationPair(
                source=cluster.instance_ids[source],
                destination=cluster.instance_ids[destination],
                reason=f"predicted miss: {now.item(source):.2f} of the deadline",
            )


class _Outlook(NamedTuple):
    """The instance with the most slack, and what is predicted of a request there."""

    row: int
    share: float
    """Share of its deadline that the tighter of the two times takes up."""
    ttft_s: float
    tpot_s: float


def _outlook(
    request: SchedulingRequest,
    cluster: ClusterSnapshot,
    policy: DeadlineSlack | DeadlineAdmission,
) -> _Outlook | None:
    """Admission and dispatch ask the same: the second finds the answer of the first."""
    ttft_slo_s = request.ttft_slo_s or policy.ttft_slo_s
    tpot_slo_s = request.tpot_slo_s or policy.tpot_slo_s
    expected_output_tokens = policy.expected_output_tokens

    def predict() -> _Outlook | None:
        c = cluster.columns
        candidates = cluster.candidates(request)
        row = cluster.argmin(c.decode_step_s, candidates)
        if row is None:
            return None
        if request.num_prompt_tokens <= c.num_room_blocks.item(row) * c.block_size.item(row):
            # It waits for no blocks where steps are shortest. If the step is the tighter of the two
            # times there, as it nearly always is, no other instance has more slack.
            num_tokens = c.num_prefill_tokens_pending.item(row) + request.num_prompt_tokens
            step_s = c.decode_step_s.item(row)
            first_s = _prefill_s(num_tokens, c.prefill_token_s.item(row), step_s)
            if first_s * (1 / ttft_slo_s) <= step_s * (1 / tpot_slo_s):
                return _Outlook(row, step_s * (1 / tpot_slo_s), first_s, step_s)
        ttft_s = predicted_ttft_s(request, cluster, expected_output_tokens)
        share = ttft_s * (1 / ttft_slo_s)
        np.maximum(share, c.decode_step_s * (1 / tpot_slo_s), out=share)
        row = cluster.argmin(share, candidates)
        assert row is not None
        return _Outlook(row, share.item(row), ttft_s.item(row), c.decode_step_s.item(row))

    key = (request.request_id, ttft_slo_s, tpot_slo_s, expected_output_tokens)
    return cluster.fresh(key, predict)


def predicted_ttft_s(
    request: SchedulingRequest, cluster: ClusterSnapshot, expected_output_tokens: int
) -> FloatColumn:
    """Seconds until the first token, a row each: wait for blocks, then prefill behind others."""
    c = cluster.columns
    num_tokens = c.num_prefill_tokens_pending + request.num_prompt_tokens
    ttft_s = _prefill_s(num_tokens, c.prefill_token_s, c.decode_step_s)
    missing = cluster.demand_blocks(request) - c.num_room_blocks
    ttft_s += _block_wait_s(cluster, missing, expected_output_tokens)
    return ttft_s


def _prefill_s(num_tokens: N, prefill_token_s: N, step_s: N) -> N:
    """Seconds to compute prompt tokens in chunks, and the step of the last chunk."""
    return num_tokens * prefill_token_s + step_s


def _block_wait_s(
    cluster: ClusterSnapshot, missing: FloatColumn, expected_output_tokens: int
) -> FloatColumn:
    """Seconds until missing blocks are free: requests end after about that many tokens."""
    wait_s: FloatColumn = np.maximum(missing, 0) * cluster.columns.block_turnover_s
    wait_s *= expected_output_tokens
    return wait_s


def bundle() -> PolicyBundle:
    """For deadlines: predicted TTFT and TPOT place, migrate, and reject early."""
    return PolicyBundle(
        name="slo",
        dispatch=DeadlineSlack(),
        migration=DeadlinePairs(),
        scaling=FreenessRange(),
        admission=DeadlineAdmission(),
        victim=LowPriorityShort(),
    )
