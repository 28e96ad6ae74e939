"""DualMap (ICLR 2026, arXiv 2602.06502): two candidates a prompt, by two hashes of its start.

Prompts that begin alike have the same two candidates on two rings of instances, so that few caches
hold them, and different ones spread as by the power of two choices. Of the two the one with more of
the prompt cached takes it, unless its time to first token is expected to miss the bound: then the
earlier of the two. Where a queue has grown past the bound, what waits there moves to its other
candidate, if that is earlier: it holds no KV, so nothing is copied.

Departures: the hash is of a fixed number of leading blocks (`key_blocks`), and a prompt without
hashes is spread by its id; cached prefixes are those that the engines report; a time is predicted
from the load reports. Invariants: while both candidates accept work no third is chosen; a ring
changes by the share of the instance that joins or leaves alone.
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from llumsched.core.options import SchedulerOptions
from llumsched.core.params import param
from llumsched.core.policy import MigrationPair, Placement, PolicyBundle
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.core.types import SchedulingRequest
from llumsched.policies.low_priority_short import LowPriorityShort
from llumsched.policies.prefix_aware import INDEX_BLOCKS

_POINTS = 32
"""Points of an instance on each ring."""
KEY_DOC = "Leading blocks of the prompt that its candidates follow from."
SLO_DOC = "Bound on the time to first token of a request that brings none, in seconds."
_Rings = tuple[list[int], list[int], list[int], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DualHash:
    """Send each prompt to the better of the two instances that its start maps to."""

    key_blocks: int = param(8, KEY_DOC, at_least=1)
    ttft_slo_s: float = param(2.0, SLO_DOC, above=0)

    def dispatch(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Placement | None:
        pair = candidate_rows(request, cluster, self.key_blocks)
        if pair is None:
            row = cluster.argmin(cluster.columns.prefill_ends_s, cluster.candidates(request))
            if row is None:
                return None
            reason = "neither candidate accepts it; the earliest"
            return Placement(instance_id=cluster.instance_ids[row], reason=reason)
        cached = [cached_tokens(request, cluster, row) for row in pair]
        ttft_s = [
            expected_ttft_s(request, cluster, row, num)
            for row, num in zip(pair, cached, strict=True)
        ]
        order = sorted(range(len(pair)), key=lambda i: (-cached[i], ttft_s[i], pair[i]))
        best = order[0]
        if ttft_s[best] > (request.ttft_slo_s or self.ttft_slo_s):
            best = min(order, key=lambda i: (ttft_s[i], pair[i]))
        return Placement(
            instance_id=cluster.instance_ids[pair[best]],
            reason=f"{cached[best]} tokens cached, first token in {ttft_s[best]:.2f} s",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HotSpots:
    """Move what waits past its bound to its other candidate, where that is earlier."""

    key_blocks: int = param(8, KEY_DOC, at_least=1)
    ttft_slo_s: float = param(2.0, SLO_DOC, above=0)
    max_moves: int = param(4, "Requests that leave one instance at a decision.", at_least=1)

    def rebalance(self, cluster: ClusterSnapshot) -> Iterator[MigrationPair]:
        c = cluster.columns
        late = (c.num_waiting > 0) & (c.prefill_ends_s - cluster.now > self.ttft_slo_s)
        for row in np.flatnonzero(late & (c.is_accepting | c.is_draining)).tolist():
            yield from self._relieve(row, cluster)

    def _relieve(self, row: int, cluster: ClusterSnapshot) -> Iterator[MigrationPair]:
        requests = cluster.requests_on(cluster.instance_ids[row])
        waiting = np.flatnonzero(~requests.is_running)
        num_moves = 0
        # The last of the queue wait longest.
        for index in waiting[::-1].tolist():
            request = requests.requests[index]
            others = candidate_rows(request, cluster, self.key_blocks) or ()
            for other in others:
                here_s, there_s = (
                    expected_ttft_s(request, cluster, r, cached_tokens(request, cluster, r))
                    for r in (row, other)
                )
                if other != row and there_s < here_s / 2:
                    yield MigrationPair(
                        source=cluster.instance_ids[row],
                        destination=cluster.instance_ids[other],
                        request_id=request.request_id,
                        reason=f"first token in {there_s:.2f} s, not {here_s:.2f}",
                        balances=False,
                    )
                    num_moves += 1
                    break
            if num_moves == self.max_moves:
                return


def candidate_rows(
    request: SchedulingRequest, cluster: ClusterSnapshot, key_blocks: int
) -> tuple[int, ...] | None:
    """The candidates that accept the request; None if neither does."""
    hashes = request.prefix_hashes
    key = hashes[min(key_blocks, len(hashes)) - 1] if hashes else request.request_id
    points_a, rows_a, points_b, rows_b = cluster.stable("dualmap rings", lambda: _rings(cluster))
    if not points_a:
        return None
    first = rows_a[bisect.bisect(points_a, _point(f"a{key}")) % len(points_a)]
    start = bisect.bisect(points_b, _point(f"b{key}"))
    # The second ring's next instance that is another one.
    following = (rows_b[(start + i) % len(rows_b)] for i in range(len(rows_b)))
    second = next((row for row in following if row != first), first)
    able = cluster.candidates(request)
    pair = tuple(dict.fromkeys((first, second)))
    if able is not None:
        pair = tuple(row for row in pair if able[row])
    return pair or None


def _rings(cluster: ClusterSnapshot) -> _Rings:
    """Points of the instances that accept work, in order, and their rows, on both rings."""
    rings: list[list[int]] = []
    for ring in "ab":
        points = sorted(
            (_point(f"{ring}{instance_id}/{number}"), row)
            for row, instance_id in enumerate(cluster.instance_ids)
            if cluster.columns.is_accepting[row]
            for number in range(_POINTS)
        )
        rings += [[point for point, _ in points], [row for _, row in points]]
    return rings[0], rings[1], rings[2], rings[3]


def _point(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def cached_tokens(request: SchedulingRequest, cluster: ClusterSnapshot, row: int) -> int:
    """Leading tokens of the prompt that an instance has cached, less the last of all."""
    for num_blocks, rows in cluster.fresh(
        ("prefix", request.request_id), lambda: tuple(cluster.match_prefix(request))
    ):
        if row in rows:
            num_tokens = num_blocks * cluster.columns.block_size.item(row)
            return max(0, min(int(num_tokens), request.num_prompt_tokens - 1))
    return 0


def expected_ttft_s(
    request: SchedulingRequest, cluster: ClusterSnapshot, row: int, num_cached: int
) -> float:
    """Prompts before it, its own less what is cached, and a step."""
    c = cluster.columns
    before_s = max(0.0, c.prefill_ends_s.item(row) - cluster.now)
    own_s = (request.num_prompt_tokens - num_cached) * c.prefill_token_s.item(row)
    step_s: float = c.decode_step_s.item(row)
    return before_s + own_s + step_s


def bundle() -> PolicyBundle:
    """Comparison: two candidates by hashes of the prompt's start, queues mended (DualMap)."""
    return PolicyBundle(
        name="dualmap",
        dispatch=DualHash(),
        migration=HotSpots(),
        victim=LowPriorityShort(),
        options=SchedulerOptions(
            prefix_index_blocks=INDEX_BLOCKS, follow_requests=True, migration_settle_s=1.0
        ),
    )
