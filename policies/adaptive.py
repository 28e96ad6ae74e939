"""One rule for every decision: the choice with the least expected cost to all requests concerned.

Costs are seconds that requests wait, from step times and lengths of answers that the scheduler
learns from the load reports; no threshold belongs to a trace or a pool.

* Dispatch: time to first token there (the prompts before it, its own less what is cached, a step),
  the stall it causes to those that decode there, the slower steps of all for as long as it decodes,
  and the evictions that become likelier. Where no instance has room it waits, and shorter ones may
  pass it for a while: in an engine's queue it would hold up all behind it, while room comes free
  elsewhere.
* Migration: the eviction that it makes less likely against the pause, the wait at the destination,
  and the eviction it makes likelier there. Running requests are moved late, when room to grow in
  the time that a move takes runs out: until then it is not known who needs it. The instance with
  most room is cleared for the first that waits.

Related: Llumnix (OSDI '24) balances freeness, at thresholds; Dynamo's router and llm-d's scorers
add prefill and load, in blocks or points, and do not move.

Invariants: what is placed has room, unless its instance is idle; nobody is passed for longer than
`patience_s`; a move is proposed only if it is expected to save more than it costs, or if its source
drains.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from llumsched.core.options import SchedulerOptions
from llumsched.core.params import param
from llumsched.core.policy import Hold, MigrationPair, Placement, PolicyBundle
from llumsched.core.snapshot import MAX_RISK_EXPONENT, ClusterSnapshot, FloatColumn, IntColumn
from llumsched.core.types import PriorityClass, SchedulingRequest, Scores
from llumsched.policies.freeness_range import FreenessRange
from llumsched.policies.low_priority_short import LowPriorityShort
from llumsched.policies.prefix_aware import INDEX_BLOCKS

_HIGH = int(PriorityClass.HIGH)
_FEW_ROWS = 4
"""Up to as many, numbers one by one are faster than columns."""
HIGH_DOC = "What a second of a request of high execution priority counts against one of another."


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastCost:
    """Send each request where it costs all requests concerned least, or hold it for room."""

    stall_weight: float = param(
        0.01,
        "What a second that a running request is stalled by a prompt counts against a second of "
        "waiting for a first token: it is shared by all that run there.",
        at_least=0,
    )
    decode_weight: float = param(
        0.03, "The same of a second by which decoding takes longer.", at_least=0
    )
    high_weight: float = param(4.0, HIGH_DOC, at_least=1)
    patience_s: float = param(
        2.0,
        "A held request lets others pass that fit where it does not, for this long.",
        at_least=0,
    )

    def dispatch(
        self, request: SchedulingRequest, cluster: ClusterSnapshot
    ) -> Placement | Hold | None:
        c = cluster.columns
        candidates = cluster.candidates(request)
        cost = self._cost_s(request, cluster)
        row = cluster.argmin(cost, candidates)
        if row is None:
            return None
        need = cluster.demand_blocks(request)
        here = need if isinstance(need, int) else need.item(row)
        if c.num_spare_blocks.item(row) < here:
            fits = c.num_spare_blocks >= need
            if candidates is not None:
                fits &= candidates
            row = cluster.argmin(cost, fits)
            if row is None:
                return self._hold(request, cluster)
        expected_s = cost.item(row) - cluster.now
        return Placement(
            instance_id=cluster.instance_ids[row],
            reason=f"expected cost {expected_s:.3f} s beside {c.batch_size.item(row):.0f} requests",
            scores=Scores("expected cost in s", cluster.instance_ids, cost, -cluster.now),
        )

    def _cost_s(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> FloatColumn:
        c = cluster.columns
        step_time = cluster.step_time
        num_tokens = request.num_prompt_tokens
        # All that is the request's own counts `own` times as much as what it does to others.
        own = self.high_weight if request.execution_priority >= _HIGH else 1.0
        stall_s = self.stall_weight * step_time.prefill_token_s / own
        decode_s = self.decode_weight * cluster.mean_output_tokens
        slower_s = decode_s * (step_time.kv_token_s * num_tokens + step_time.running_s) / own
        beside_s = stall_s * num_tokens + slower_s
        demand = cluster.demand_blocks(request)
        more_high = self.high_weight - 1.0
        # In the order of `TERMS`.
        cost = c.weighted(
            (
                1.0 + decode_s,
                num_tokens,
                demand / own if isinstance(demand, int) else 0.0,
                beside_s,
                beside_s * more_high,
            )
        )
        if not isinstance(demand, int):
            cost += c.block_price_s * (demand / own)
        # Seconds from time 0, as the ends of prompts are: it is the same for all.
        cost += np.maximum(c.prefill_ends_s, cluster.now)
        for num_blocks, rows in cluster.match_prefix(request):
            saved = self._saved_tokens(num_tokens, num_blocks, rows, cluster)
            if len(rows) <= _FEW_ROWS and isinstance(saved, float):
                for row in rows.tolist():
                    of_others = c.batch_size.item(row) + more_high * c.num_high_running.item(row)
                    cost[row] -= saved * (c.prefill_token_s.item(row) + stall_s * of_others)
            else:
                of_a_token = (0.0, 1.0, 0.0, stall_s, stall_s * more_high)
                cost[rows] -= saved * c.weighted(of_a_token, rows)
        return cost

    def _saved_tokens(
        self, num_tokens: int, num_blocks: int, rows: IntColumn, cluster: ClusterSnapshot
    ) -> FloatColumn | float:
        """Prompt tokens that are cached, and what attention to them saves of the others' cost."""
        step_time = cluster.step_time
        pair_tokens = 0.5 * step_time.prefill_pair_s / max(step_time.prefill_token_s, 1e-9)
        # The last token is computed in any case.
        if cluster.block_size is None:
            of_rows: FloatColumn = num_blocks * cluster.columns.block_size[rows]
            of_rows *= 1.0 + pair_tokens * of_rows
            return np.minimum(of_rows, num_tokens - 1.0)
        num_cached = num_blocks * cluster.block_size
        return min(num_cached * (1.0 + pair_tokens * num_cached), num_tokens - 1.0)

    def _hold(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Hold:
        queued_s = cluster.queued_s(request.request_id)
        waited_s = 0.0 if queued_s is None else cluster.now - queued_s
        return Hold(
            reason="no instance has room for the prompt yet",
            others_may_pass=waited_s < self.patience_s,
        )


def _growth_tokens(cluster: ClusterSnapshot, row: int) -> float:
    """Tokens by which a running request grows until a migration can take effect."""
    return cluster.reaction_s / max(cluster.columns.decode_step_s.item(row), 1e-4)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedWin:
    """Move a request where that is expected to save more waiting than it costs."""

    margin: float = param(
        1.0, "A move is made if it is expected to save this many times its cost.", at_least=0
    )
    max_clearing: int = param(
        4, "Requests moved at one decision off an instance that is cleared.", at_least=1
    )

    def rebalance(self, cluster: ClusterSnapshot) -> Iterable[MigrationPair]:
        c = cluster.columns
        room = c.num_room_blocks.copy()
        pool = _Pool(cluster, room)
        clearing = self._clearing_row(cluster)
        if clearing is not None:
            yield from self._clear(clearing, pool)
            # Nobody else is moved there, and what is cleared is not cleared twice.
            room[clearing] = 0.0
        left = room * c.block_size
        left /= np.maximum(c.num_requests, 1.0)
        left *= c.decode_step_s
        may_leave = (c.num_running > 1) & c.is_accepting
        draining = c.is_draining & c.is_fresh & (c.num_running > 0)
        near = left < _FAR * cluster.reaction_s
        sources = np.flatnonzero((may_leave & near) | draining)
        if clearing is not None:
            sources = sources[sources != clearing]
        if not len(sources):
            return
        urgency = np.where(draining, np.inf, c.block_price_s)[sources]
        sources = sources[np.argsort(-urgency, kind="stable")][:_MOST_ROWS]
        others = c.is_accepting & (c.num_waiting == 0) & (room > 0)
        destinations = np.flatnonzero(others)
        destinations = destinations[np.argsort(-left[destinations], kind="stable")][:_MOST_ROWS]
        following = iter(destinations.tolist())
        for source in sources.tolist():
            pair = self._pair(source, following, pool)
            if pair is None:
                return
            yield pair

    def _pair(
        self, source: int, destinations: Iterator[int], pool: "_Pool"
    ) -> MigrationPair | None:
        """The next destination that is worth it."""
        drains = bool(pool.columns.is_draining[source])
        for destination in destinations:
            if destination == source:
                continue
            win_s, cost_s = pool.win_s(source, destination), pool.cost_s(source, destination)
            if drains or win_s > self.margin * cost_s:
                reason = "it drains" if drains else f"expected to save {win_s:.2f} s"
                reason = f"{reason} for {cost_s:.2f} s"
                return pool.pair(source, destination, reason, win_s, cost_s)
        return None

    def _clearing_row(self, cluster: ClusterSnapshot) -> int | None:
        """The instance where the first that waits will have room first, if it has none yet."""
        held = cluster.held()
        if not held:
            return None
        row = cluster.argmax(cluster.columns.num_room_blocks, cluster.candidates(held[0]))
        return row if row is not None and cluster.columns.num_running[row] > 1 else None

    def _clear(self, source: int, pool: "_Pool") -> Iterator[MigrationPair]:
        """Moves until the first that waits has room, while they save it more than they cost."""
        cluster, c = pool.cluster, pool.columns
        need = cluster.demand_blocks(cluster.held()[0])
        missing = (need if isinstance(need, int) else need.item(source)) - pool.room.item(source)
        missing += (
            _growth_tokens(cluster, source)
            * c.num_requests.item(source)
            / (c.block_size.item(source))
        )
        victim_blocks = max(1.0, c.victim_blocks.item(source))
        ready = c.is_accepting & (pool.room > 2 * victim_blocks) & (c.num_waiting == 0)
        ready[source] = False
        rows = np.flatnonzero(ready)
        rows = rows[np.argsort(-pool.room[rows], kind="stable")]
        turnover_s = c.block_turnover_s.item(source) * cluster.mean_output_tokens
        for destination in rows.tolist()[: self.max_clearing]:
            if missing <= 0:
                return
            win_s = min(missing, victim_blocks) * turnover_s
            cost_s = pool.cost_s(source, destination)
            cost_s += victim_blocks * c.block_price_s.item(destination)
            if win_s <= self.margin * cost_s:
                return
            missing -= victim_blocks
            reason = f"room for a held prompt, {win_s:.2f} s sooner for {cost_s:.2f} s"
            yield pool.pair(source, destination, reason, win_s, cost_s)


_MOST_ROWS = 128
"""Instances looked at as sources, and as destinations: far more than moves start at a decision."""
_FAR = 8.0
"""Sources with room to grow for this many times the reaction have no eviction to fear."""


class _Pool:
    """Worth of moves between instances. `room` may be changed meanwhile."""

    def __init__(self, cluster: ClusterSnapshot, room: FloatColumn) -> None:
        self.cluster = cluster
        self.columns = c = cluster.columns
        self.room = room
        # Numbers one by one are read faster from lists.
        self._block_size: list[float] = c.block_size.tolist()
        self._num_requests: list[float] = c.num_requests.tolist()
        self._victim_blocks: list[float] = c.victim_blocks.tolist()
        self._num_used: list[float] = c.num_used_blocks.tolist()
        self._step_s: list[float] = c.decode_step_s.tolist()
        self._token_s: list[float] = c.prefill_token_s.tolist()
        self._ends_s: list[float] = np.maximum(c.prefill_ends_s, cluster.now).tolist()

    def pair(
        self, source: int, destination: int, reason: str, win_s: float, cost_s: float
    ) -> MigrationPair:
        ids = self.cluster.instance_ids
        return MigrationPair(
            source=ids[source],
            destination=ids[destination],
            reason=reason,
            balances=False,
            expected_win_s=win_s,
            expected_cost_s=cost_s,
        )

    def win_s(self, source: int, destination: int) -> float:
        """Waiting after evictions that the move is expected to save, at both ends together."""
        victim_blocks = max(1.0, self._victim_blocks[source])
        num_here, num_there = self._num_requests[source], self._num_requests[destination]
        here, there = self.room.item(source), self.room.item(destination)
        saved = self._risk(source, here, num_here)
        saved -= self._risk(source, here + victim_blocks, num_here - 1)
        added = self._risk(destination, there - victim_blocks, num_there + 1)
        added -= self._risk(destination, there, num_there)
        eviction_s = self._eviction_s(source, num_here)
        return saved * eviction_s - added * max(
            eviction_s * num_here / (num_there + 1), self._eviction_s(destination, num_there)
        )

    def cost_s(self, source: int, destination: int) -> float:
        """The pause of the move, and the prompts that steps there compute meanwhile."""
        more_s = self._ends_s[destination] - self._ends_s[source]
        return 2 * self._step_s[destination] + max(0.0, more_s)

    def _risk(self, row: int, room: float, num_requests: float) -> float:
        """Requests expected to be evicted before a move could help, from the room they have."""
        if num_requests <= 0:
            return 0.0
        tokens = room * self._block_size[row] / num_requests
        exponent = -tokens * max(self._step_s[row], 1e-4) / self.cluster.reaction_s
        return num_requests * math.exp(max(-30.0, min(MAX_RISK_EXPONENT, exponent)))

    def _eviction_s(self, row: int, num_requests: float) -> float:
        """A wait until one of the others ends, and the recompute."""
        num_requests = max(1.0, num_requests)
        wait_s = self.cluster.mean_output_tokens * self._step_s[row] / num_requests
        num_tokens = self._num_used[row] * self._block_size[row] / num_requests
        return wait_s + num_tokens * self._token_s[row]


def bundle() -> PolicyBundle:
    """For any traffic: each dispatch and move is the one with the least expected cost to all."""
    return PolicyBundle(
        name="adaptive",
        dispatch=LeastCost(),
        migration=ExpectedWin(),
        scaling=FreenessRange(),
        victim=LowPriorityShort(),
        options=SchedulerOptions(
            migration_interval_s=0.2,
            migration_settle_s=1.0,
            max_migrations_out=4,
            queue_timeout_s=600.0,
            prefix_index_blocks=INDEX_BLOCKS,
            learn_costs=True,
        ),
    )
