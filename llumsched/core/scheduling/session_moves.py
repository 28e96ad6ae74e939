"""KV of idle sessions on its way to where their next turns will be.

    a turn is placed away from home   -> it is held, its session's KV moves, and it goes after it
    a draining instance is empty      -> its sessions leave, those seen last first
    an operator asks                  -> that session moves

What moves is what an engine has cached of the last turn: nothing runs, and what is not there any
more is computed again, as without a move.

Invariants: nothing moves by itself that would be computed as fast as it is copied; at most
`max_session_moves` are under way, within the slots of `migration_arbiter`; a turn waits for one
move, and for no longer than it would take to compute what moves. This module does not know where a
turn is best placed (the policy, `sessions`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from llumsched.core.actions import Action, RefuseMigration, StartMigration
from llumsched.core.events import MigrationFinished, MigrationOutcome, MigrationRequested
from llumsched.core.options import SchedulerOptions
from llumsched.core.policy import Hold, Placement
from llumsched.core.scheduling.cluster_state import Cluster, InstanceRecord
from llumsched.core.scheduling.migration_arbiter import MigrationArbiter
from llumsched.core.scheduling.request_ledger import Ledger, RequestRecord
from llumsched.core.scheduling.sessions import Home, SessionKey, Sessions
from llumsched.core.types import InstanceState

# To reserve and to commit, an engine waits for the end of a step each.
_NUM_STEPS_OF_A_MOVE = 2.0
_FIXED_S = 0.02
# Weight of the newest move in the rate of copying.
_RATE_WEIGHT = 0.3
# A source that refused is asked again after so long, then after twice as long each time.
_REST_S, _MOST_REST_S = 1.0, 60.0
_REFUSALS_OF_A_DRAIN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """Size of a move, and how long it and its alternative take."""

    num_blocks: int
    num_bytes: int
    copy_s: float
    compute_s: float

    @property
    def is_positive(self) -> bool:
        return self.num_blocks > 0 and self.copy_s < self.compute_s


class SessionMoves:
    """See the module docstring."""

    def __init__(
        self,
        *,
        options: SchedulerOptions,
        cluster: Cluster,
        ledger: Ledger,
        sessions: Sessions,
        arbiter: MigrationArbiter,
    ) -> None:
        self._options = options
        self._cluster = cluster
        self._ledger = ledger
        self._sessions = sessions
        self._arbiter = arbiter
        self._bytes_per_s = options.session_copy_mb_s * 1e6
        # By migration: whose KV it is, and until when a turn waits for it (inf: none does).
        self._moving: dict[str, tuple[SessionKey, float]] = {}
        # Of draining instances that run nothing any more: until when they stay, and who may leave.
        self._leaving: dict[str, tuple[float, list[SessionKey]]] = {}
        # Of sources that refused: how often, and until when they are not asked.
        self._rests: dict[str, tuple[int, float]] = {}

    # A turn arrives.

    def waits(self, record: RequestRecord, now: float) -> bool:
        """True while a held turn is waiting for its session's KV."""
        if record.awaited_move is None:
            return False
        migration_id, _ = record.awaited_move
        _, until_s = self._moving.get(migration_id, (None, 0.0))
        return migration_id in self._arbiter.active and now < until_s < math.inf

    def place(
        self, record: RequestRecord, chosen: Placement, now: float, out: list[Action]
    ) -> Placement | Hold:
        """Where a turn goes for which an instance was chosen; held while its KV goes there."""
        request, options = record.request, self._options
        home = self._sessions.home_of(request, now)
        if home is None or not options.move_idle_sessions or record.redispatch_reason:
            return chosen
        if record.awaited_move is not None:
            _, destination_id = record.awaited_move
            return self._follow(home, chosen) if home.instance_id == destination_id else chosen
        source = self._cluster.records.get(home.instance_id)
        destination = self._cluster.records[chosen.instance_id]
        if source is None or source is destination or chosen.hand_over_to is not None:
            return chosen
        if source.spec.role is not destination.spec.role:
            return chosen
        num_tokens = self._num_tokens_to_gain(record, home, chosen)
        worth = self._worth(source, destination, num_tokens)
        if not worth.is_positive or not self._may_start(source, destination, home, now):
            return chosen
        key = (request.client_id, request.session_id or "")
        reason = "the next turn of its session goes there"
        migration_id = self._start(
            key, home, source, destination, worth, reason, now, out, until_s=now + worth.compute_s
        )
        record.awaited_move = (migration_id, chosen.instance_id)
        return Hold(reason="the KV of its session is on its way", others_may_pass=True)

    def _follow(self, home: Home, chosen: Placement) -> Placement:
        """The KV that a turn was held for has come: the turn goes there, if it still can."""
        row = self._cluster.snapshot.rows.get(home.instance_id)
        if row is None or not self._cluster.snapshot.columns.is_accepting[row]:
            return chosen
        reason = "the KV of its session has moved here"
        return msgspec.structs.replace(chosen, instance_id=home.instance_id, reason=reason)

    def _num_tokens_to_gain(self, record: RequestRecord, home: Home, chosen: Placement) -> int:
        """Tokens of a turn that are cached at home and not where it was placed."""
        request = record.request
        size = self._cluster.records[home.instance_id].spec.block_size
        if not (self._options.prefix_index_blocks and request.prefix_hashes):
            return min(home.num_tokens, request.num_prompt_tokens)
        depths = {home.instance_id: 0, chosen.instance_id: 0}
        snapshot = self._cluster.snapshot
        for holders in snapshot.match_prefix(request):
            for row in holders.rows:
                if snapshot.instance_ids[row] in depths:
                    depths[snapshot.instance_ids[row]] = holders.num_blocks
        return (depths[home.instance_id] - depths[chosen.instance_id]) * size

    # An instance drains.

    def evacuate(self, instance_id: str, now: float, out: list[Action]) -> bool:
        """Start what may leave an instance that drains and runs nothing; True if more is to."""
        if not self._options.move_idle_sessions:
            return False
        source = self._cluster.records[instance_id]
        if instance_id not in self._leaving:
            until_s = now + self._options.session_drain_s
            self._leaving[instance_id] = (until_s, self._at(source, now))
        until_s, keys = self._leaving[instance_id]
        while keys:
            home = self._sessions.home(keys[-1], now)
            if home is None or home.instance_id != instance_id:
                keys.pop()
                continue
            destination = self._roomiest(source, home)
            if destination is None:
                keys.pop()
                continue
            worth = self._worth(source, destination, home.num_tokens)
            if not worth.is_positive:
                keys.pop()
                continue
            if not self._may_start(source, destination, home, now):
                num_refusals, _ = self._rests.get(instance_id, (0, 0.0))
                if num_refusals < _REFUSALS_OF_A_DRAIN:
                    return True  # a slot, or the end of its rest, is waited for
                keys.clear()
                return False
            reason = f"{instance_id} drains"
            self._start(keys.pop(), home, source, destination, worth, reason, now, out)
        return False

    def _at(self, source: InstanceRecord, now: float) -> list[SessionKey]:
        """Sessions whose KV may still be in an instance's cache, the one seen last at the end."""
        found: list[SessionKey] = []
        room = source.load.num_total_blocks
        for key, home in self._sessions.latest(now):
            if home.instance_id == source.spec.instance_id:
                room -= home.num_tokens // source.spec.block_size
                if room < 0:
                    break
                found.append(key)
        return found[::-1]

    def _roomiest(self, source: InstanceRecord, home: Home) -> InstanceRecord | None:
        """The instance with the most free blocks, if the session's KV fits into half of them."""
        others = [
            record
            for record in self._cluster.records.values()
            if record is not source
            and record.state is InstanceState.SERVING
            and record.is_fresh
            and record.spec.role is source.spec.role
        ]
        best = max(others, key=_num_free_blocks, default=None)
        if best is None or 2 * home.num_tokens > _num_free_blocks(best) * best.spec.block_size:
            return None
        return best

    def forget_instance(self, instance_id: str) -> None:
        """An instance is gone."""
        self._leaving.pop(instance_id, None)
        self._rests.pop(instance_id, None)

    # An operator asks.

    def last_turn(self, session_id: str, now: float) -> tuple[SessionKey, Home] | None:
        """The last turn of the session of this name, of any client; the latest of several."""
        return next(
            (found for found in self._sessions.latest(now) if found[0][1] == session_id), None
        )

    def request(
        self,
        event: MigrationRequested,
        key: SessionKey,
        home: Home,
        now: float,
        out: list[Action],
    ) -> None:
        """Carry out an operator's wish to move an idle session, or refuse it with the reason."""
        self._cluster.at(now)
        source = self._cluster.records.get(home.instance_id)
        answer: InstanceRecord | str = f"its last instance, {home.instance_id}, is gone"
        if source is not None:
            answer = self._arbiter.destination_for(source, event.destination, now)
        if any(m.request_id == home.request_id for m in self._arbiter.active.values()):
            answer = f"session {event.session_id!r} is already moving"
        if source is None or isinstance(answer, str):
            out.append(RefuseMigration(request_id=event.request_id, reason=str(answer)))
            return
        worth = self._worth(source, answer, home.num_tokens)
        self._start(key, home, source, answer, worth, "asked by an operator", now, out)

    # Costs, and what becomes of it.

    def _worth(self, source: InstanceRecord, destination: InstanceRecord, num_tokens: int) -> Worth:
        """Costs of moving the full blocks of so many tokens, by what is known of steps here."""
        block_size = source.spec.block_size
        num_blocks = max(0, num_tokens) // block_size
        num_tokens = num_blocks * block_size
        num_bytes = num_blocks * source.spec.block_num_bytes
        model = destination.costs.step_time
        step_s = destination.load.step_time_s or model.base_s
        token_s = model.prefill_token_s + step_s / destination.spec.max_num_batched_tokens
        num_pairs = num_tokens * (num_tokens + 1) // 2
        return Worth(
            num_blocks=num_blocks,
            num_bytes=num_bytes,
            copy_s=_FIXED_S + _NUM_STEPS_OF_A_MOVE * step_s + num_bytes / self._bytes_per_s,
            compute_s=num_tokens * token_s + num_pairs * model.prefill_pair_s,
        )

    def _may_start(
        self, source: InstanceRecord, destination: InstanceRecord, home: Home, now: float
    ) -> bool:
        self._moving = {m: to for m, to in self._moving.items() if m in self._arbiter.active}
        return (
            len(self._moving) < self._options.max_session_moves
            and now >= self._rests.get(source.spec.instance_id, (0, 0.0))[1]
            and home.request_id not in self._ledger.requests
            and all(m.request_id != home.request_id for m in self._arbiter.active.values())
            and self._arbiter.blocked(source, destination, now) is None
        )

    def _start(
        self,
        key: SessionKey,
        home: Home,
        source: InstanceRecord,
        destination: InstanceRecord,
        worth: Worth,
        reason: str,
        now: float,
        out: list[Action],
        *,
        until_s: float = math.inf,
    ) -> str:
        migration = self._arbiter.start(
            source, destination, home.request_id, worth.num_blocks, now, has_ended=True
        )
        self._moving[migration.migration_id] = (key, until_s)
        out.append(
            StartMigration(
                migration_id=migration.migration_id,
                source=migration.source,
                destination=migration.destination,
                request_id=home.request_id,
                reason=reason,
                expected_win_s=worth.compute_s,
                expected_cost_s=worth.copy_s,
                has_ended=True,
                num_bytes=worth.num_bytes,
            )
        )
        return migration.migration_id

    def finished(self, event: MigrationFinished, now: float) -> None:
        """Learn how a move ended; nothing of a migration of another kind."""
        moved = self._moving.pop(event.migration_id, None)
        if moved is None or event.request_id is None:
            return
        if event.outcome is MigrationOutcome.COMMITTED:
            self._rests.pop(event.source, None)
            self._sessions.moved(moved[0], event.request_id, event.destination)
            if event.num_bytes and event.total_s > 0:
                rate = event.num_bytes / event.total_s
                self._bytes_per_s += _RATE_WEIGHT * (rate - self._bytes_per_s)
        elif event.source in self._cluster.records:
            num_refusals, _ = self._rests.get(event.source, (0, 0.0))
            rest_s = min(_MOST_REST_S, _REST_S * 2**num_refusals)
            self._rests[event.source] = (num_refusals + 1, now + rest_s)

    def tick(self, now: float) -> None:
        """Turns stop waiting, and draining instances staying, when it takes too long."""
        for migration_id, (key, until_s) in self._moving.items():
            if now >= until_s:
                self._moving[migration_id] = (key, math.inf)
        for until_s, keys in self._leaving.values():
            if now >= until_s:
                keys.clear()

    def next_deadline(self) -> float | None:
        """When a turn stops waiting, or a draining instance stays no longer for its sessions."""
        active = self._arbiter.active
        waits = [s for m, (_, s) in self._moving.items() if m in active and s < math.inf]
        return min(waits + [s for s, keys in self._leaving.values() if keys], default=None)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "bytes_per_s": self._bytes_per_s,
            "moving": [
                [m, *key, None if until_s == math.inf else until_s]
                for m, (key, until_s) in self._moving.items()
            ],
            "leaving": [[i, s, [list(key) for key in k]] for i, (s, k) in self._leaving.items()],
            "rests": [[i, *rest] for i, rest in self._rests.items()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; migrations and instances are there already."""
        self._bytes_per_s = state["bytes_per_s"]
        for migration_id, client_id, session_id, until_s in state["moving"]:
            key = (client_id, session_id)
            self._moving[migration_id] = (key, math.inf if until_s is None else until_s)
        for instance_id, until_s, keys in state["leaving"]:
            self._leaving[instance_id] = (until_s, [(a, b) for a, b in keys])
        self._rests = {i: (number, until_s) for i, number, until_s in state["rests"]}


def _num_free_blocks(record: InstanceRecord) -> int:
    return record.load.num_free_blocks - record.num_sent_blocks
