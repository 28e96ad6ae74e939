"""The global scheduler: one event in, the actions it leads to out.

It owns all mutable state and hands each event to the part that knows it; the decisions are the
policies' and the parts'.

Invariants: the same events at the same times give the same actions; `handle` never blocks and never
raises because of a policy; time never runs backwards inside. It does not know the host: what it
wants done it returns, when it wants to be woken it says in `next_deadline`.

What a host owes: every end of a request is told (by a frontend or a report); `TerminateInstance` is
followed by `InstanceLost`; a commit that happened is told before the loss of its source, else the
request is dispatched again while it runs; `Ticked` comes at the deadline.
"""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llumsched.core.actions import Action, RefuseMigration
from llumsched.core.events import (
    DrainRequested,
    Event,
    InstanceJoined,
    InstanceLost,
    KvBlocksRemoved,
    KvBlocksStored,
    KvCacheCleared,
    LaunchFailed,
    LoadReported,
    MigrationFinished,
    MigrationRequested,
    ReplacementsCounted,
    RequestAborted,
    RequestArrived,
    RequestFinished,
    RequestSentElsewhere,
    ScaleRequested,
    Ticked,
)
from llumsched.core.load import Headroom
from llumsched.core.options import SchedulerOptions
from llumsched.core.policy import PolicyBundle, Stateful
from llumsched.core.request_columns import RequestColumns
from llumsched.core.scheduling.cluster_state import Cluster
from llumsched.core.scheduling.cost_model import CostModel
from llumsched.core.scheduling.dispatch_queue import DispatchQueue
from llumsched.core.scheduling.dispatcher import Dispatcher
from llumsched.core.scheduling.instance_lifecycle import InstanceLifecycles
from llumsched.core.scheduling.migration_arbiter import MigrationArbiter
from llumsched.core.scheduling.prefix_index import PrefixIndex
from llumsched.core.scheduling.rebalancer import Rebalancer
from llumsched.core.scheduling.request_ledger import Ledger
from llumsched.core.scheduling.scaler import Scaling
from llumsched.core.scheduling.session_moves import SessionMoves
from llumsched.core.scheduling.sessions import Sessions
from llumsched.core.snapshot import ClusterSnapshot, PrefixHolders
from llumsched.core.step_time import StepTimeModel
from llumsched.core.types import SchedulingRequest, Scores

REACTION_INTERVALS = 2.5
"""From a need for a migration to its effect: the next decision, a report, and the copy."""


class GlobalScheduler:
    """See the module docstring. `options` defaults to what the bundle asks for."""

    def __init__(
        self, bundle: PolicyBundle, options: SchedulerOptions | None = None, seed: int = 0
    ) -> None:
        self.bundle = bundle
        self.options = options = options if options is not None else bundle.options
        self._now = 0.0
        self._prefix_index = (
            PrefixIndex(options.prefix_index_blocks) if options.prefix_index_blocks else None
        )
        self._queue = DispatchQueue()
        step_time = StepTimeModel(
            base_s=options.step_base_s,
            prefill_token_s=options.step_prefill_token_s,
            running_s=options.step_running_s,
        )
        self._costs = CostModel(step_time) if options.learn_costs else None
        self._cluster = Cluster(
            headroom=Headroom(target_load=options.high_priority_target_load),
            stale_after_s=options.stale_after_s,
            rng=random.Random(seed),
            step_time=step_time,
            costs=self._costs,
            reaction_s=REACTION_INTERVALS * options.migration_interval_s,
            queued_s=self._queued_s,
            held=self._held,
            match_prefix=self._match_prefix,
            requests_on=self._requests_on,
        )
        self._sessions = Sessions(options)
        self._ledger = Ledger(self._cluster, self._sessions)
        self._arbiter = MigrationArbiter(self._cluster, options)
        self._session_moves = SessionMoves(
            options=options,
            cluster=self._cluster,
            ledger=self._ledger,
            sessions=self._sessions,
            arbiter=self._arbiter,
        )
        self._dispatcher = Dispatcher(
            bundle=bundle,
            options=options,
            cluster=self._cluster,
            ledger=self._ledger,
            queue=self._queue,
            sessions=self._sessions,
            session_moves=self._session_moves,
        )
        self._rebalancer = Rebalancer(
            policy=bundle.migration,
            options=options,
            cluster=self._cluster,
            ledger=self._ledger,
            dispatcher=self._dispatcher,
            arbiter=self._arbiter,
        )
        self._instances = InstanceLifecycles(
            options=options,
            cluster=self._cluster,
            ledger=self._ledger,
            dispatcher=self._dispatcher,
            rebalancer=self._rebalancer,
            arbiter=self._arbiter,
            session_moves=self._session_moves,
            prefix_index=self._prefix_index,
        )
        self._scaling = Scaling(
            policy=bundle.scaling,
            options=options,
            cluster=self._cluster,
            drain=lambda instance_id, now, out: self._instances.drain(instance_id, None, now, out),
            num_live=lambda: len(self._ledger.requests),
            num_held=lambda: len(self._queue),
        )
        self._handlers: dict[type, Callable[[Any, float, list[Action]], None]] = {
            InstanceJoined: self._joined,
            InstanceLost: self._lost,
            LaunchFailed: self._launch_failed,
            ReplacementsCounted: self._replacements_counted,
            LoadReported: self._load_reported,
            RequestArrived: self._arrived,
            RequestFinished: self._finished,
            RequestAborted: self._aborted,
            RequestSentElsewhere: self._sent_elsewhere,
            MigrationFinished: self._migration_finished,
            MigrationRequested: self._migration_requested,
            DrainRequested: self._drain_requested,
            ScaleRequested: self._scale_requested,
            KvBlocksStored: self._blocks_stored,
            KvBlocksRemoved: self._blocks_removed,
            KvCacheCleared: self._cache_cleared,
            Ticked: self._ticked,
        }

    def handle(self, event: Event, now: float) -> tuple[Action, ...]:
        """Take in one event at time `now` (seconds on any monotonic clock).

        Raises:
            TypeError: not an event.
        """
        handler = self._handlers.get(type(event))
        if handler is None:
            raise TypeError(f"not an event the scheduler knows: {event!r}")
        if now < self._now:
            now = self._now
        self._now = now
        out: list[Action] = []
        if self._dispatcher.scores:
            self._dispatcher.scores.clear()
        handler(event, now, out)
        return tuple(out)

    @property
    def scores(self) -> Mapping[str, Scores]:
        """By what the policy compared instances, for each request that the last event dispatched.

        Only of policies that say so; no action depends on it.
        """
        return self._dispatcher.scores

    def next_deadline(self) -> float | None:
        """When `Ticked` must come, if nothing else happens before; None: never."""
        deadlines = (
            self._dispatcher.next_deadline(),
            self._rebalancer.next_deadline(),
            self._instances.next_deadline(),
            self._scaling.next_deadline(),
            self._session_moves.next_deadline(),
        )
        return min((d for d in deadlines if d is not None), default=None)

    def snapshot(self, now: float) -> ClusterSnapshot:
        """A copy of the cluster as policies see it, to keep."""
        return self._cluster.detached(max(now, self._now))

    def request_instance(self, request_id: str) -> str | None:
        """The instance a request is on; None while it is queued, or if it is unknown."""
        record = self._ledger.requests.get(request_id)
        return None if record is None else record.instance_id

    @property
    def num_requests(self) -> int:
        """Live requests, queued ones included."""
        return len(self._ledger.requests)

    @property
    def draining(self) -> Collection[str]:
        """Ids of the instances that are being drained; a view of the present moment."""
        return self._instances.draining

    def num_queued_by_class(self) -> dict[int, int]:
        """Requests held in the dispatch queue, by scheduling priority class."""
        counts: dict[int, int] = {}
        for record in self._queue.in_order():
            priority = record.request.scheduling_priority
            counts[priority] = counts.get(priority, 0) + 1
        return counts

    def checkpoint(self) -> dict[str, Any]:
        """All state as JSON values: `restore` makes another scheduler decide as this one would."""
        version, internal, gauss = self._cluster.snapshot.rng.getstate()
        return {
            "now": self._now,
            "rng": [version, list(internal), gauss],
            "instances": self._instances.state(),
            "requests": self._ledger.state(),
            "next_sequence": self._ledger.next_sequence,
            "held": [
                [record.request.request_id, self._queue.deadline(record)]
                for record in self._queue.in_order()
            ],
            "migrations": self._arbiter.state(),
            "next_rebalance_s": self._rebalancer.next_s,
            "dispatcher": self._dispatcher.state(),
            "sessions": self._sessions.state(),
            "session_moves": self._session_moves.state(),
            "scaling": self._scaling.state(),
            "num_replacing": self._cluster.num_replacing,
            "prefix_blocks": {} if self._prefix_index is None else self._prefix_index.state(),
            "costs": None if self._costs is None else self._costs.state(),
            "policies": {
                type(policy).__qualname__: policy.state()
                for policy in self.bundle.policies().values()
                if isinstance(policy, Stateful)
            },
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; for a new scheduler. Another bundle starts without memory."""
        self._now = state["now"]
        if self._costs is not None and state["costs"] is not None:
            self._costs.restore(state["costs"])
            self._cluster.show_costs()
        version, internal, gauss = state["rng"]
        self._cluster.snapshot.rng.setstate((version, tuple(internal), gauss))
        self._instances.restore(state["instances"], self._now)
        self._ledger.restore(state["requests"], state["next_sequence"])
        for request_id, deadline_s in state["held"]:
            self._queue.push(self._ledger.requests[request_id], deadline_s)
        self._arbiter.restore(state["migrations"])
        if self._rebalancer.next_s is not None and state["next_rebalance_s"] is not None:
            self._rebalancer.next_s = state["next_rebalance_s"]
        self._dispatcher.restore(state["dispatcher"])
        self._sessions.restore(state.get("sessions", ()))
        if "session_moves" in state:
            self._session_moves.restore(state["session_moves"])
        self._scaling.restore(state["scaling"])
        self._cluster.num_replacing = state.get("num_replacing", 0)
        if self._prefix_index is not None:
            self._prefix_index.restore(state["prefix_blocks"])
        for policy in self.bundle.policies().values():
            if isinstance(policy, Stateful) and type(policy).__qualname__ in state["policies"]:
                policy.restore(state["policies"][type(policy).__qualname__])

    def _held(self) -> tuple[SchedulingRequest, ...]:
        if not len(self._queue):
            return ()
        limit = self.options.max_queue_attempts
        return tuple(record.request for record in self._queue.in_order(limit))

    def _queued_s(self, request_id: str) -> float | None:
        record = self._ledger.requests.get(request_id)
        return None if record is None else record.queued_s

    def _match_prefix(self, request: SchedulingRequest) -> Sequence[PrefixHolders]:
        if self._prefix_index is None or not request.prefix_hashes:
            return ()
        return self._prefix_index.match(request.prefix_hashes, self._cluster.snapshot.instance_ids)

    def _requests_on(self, instance_id: str) -> RequestColumns:
        remaining = getattr(self.bundle.predictor, "predict_remaining", None)
        return self._ledger.columns(self._cluster.records[instance_id], self._now, remaining)

    # Requests.

    def _arrived(self, event: RequestArrived, now: float, out: list[Action]) -> None:
        self._scaling.request_changed(now)
        self._dispatcher.arrive(event.request, now, out, has_begun=event.has_begun)
        self._scaling.launch_for_held(now, out)

    def _finished(self, event: RequestFinished, now: float, out: list[Action]) -> None:
        self._end(event.request_id, event.num_output_tokens, now, out)

    def _aborted(self, event: RequestAborted, now: float, out: list[Action]) -> None:
        self._end(event.request_id, None, now, out)

    def _end(
        self, request_id: str, num_output_tokens: int | None, now: float, out: list[Action]
    ) -> None:
        record = self._ledger.requests.get(request_id)
        if record is None:
            self._dispatcher.dispatch_held(now, out)
            return
        instance_id = record.instance_id
        self._scaling.request_changed(now)
        if instance_id is not None:
            self._sessions.ran(record.request, instance_id, now, num_output_tokens)
        self._dispatcher.end(record, num_output_tokens, out)
        self._dispatcher.dispatch_held(now, out)
        if instance_id is not None:
            self._instances.leave_if_empty(instance_id, now, out)

    def _sent_elsewhere(self, event: RequestSentElsewhere, now: float, out: list[Action]) -> None:
        request_id = event.request.request_id
        instance = self._cluster.records.get(event.instance_id)
        if instance is None:
            return  # it names the request when it joins
        before = self.request_instance(request_id)
        self._scaling.request_changed(now)
        self._dispatcher.sent_elsewhere(event.request, instance, now)
        self._dispatcher.dispatch_held(now, out)
        if before is not None:
            self._instances.leave_if_empty(before, now, out)

    # Instances.

    def _joined(self, event: InstanceJoined, now: float, out: list[Action]) -> None:
        self._dispatcher.instance_joins(now)
        self._instances.join(event, now)
        self._scaling.joined(event.launch_id, now)
        self._dispatcher.dispatch_held(now, out)
        newcomer = self._cluster.records.get(event.spec.instance_id)
        if newcomer is not None:
            self._rebalancer.relieve(newcomer, now, out)

    def _lost(self, event: InstanceLost, now: float, out: list[Action]) -> None:
        self._instances.lose(event.instance_id, now)
        self._dispatcher.dispatch_held(now, out)
        self._scaling.launch_for_held(now, out)

    def _load_reported(self, event: LoadReported, now: float, out: list[Action]) -> None:
        self._instances.report(event.load, now, out)
        self._dispatcher.dispatch_held(now, out)

    def _drain_requested(self, event: DrainRequested, now: float, out: list[Action]) -> None:
        self._instances.drain(event.instance_id, event.deadline_s, now, out)

    def _launch_failed(self, event: LaunchFailed, now: float, out: list[Action]) -> None:
        if self._scaling.launch_failed(event.launch_id, event.reason, now):
            self._dispatcher.expire(now, event.reason, out, has_failed=True)

    def _replacements_counted(
        self, event: ReplacementsCounted, now: float, out: list[Action]
    ) -> None:
        self._cluster.num_replacing = event.num_instances
        self._dispatcher.expire(now, self._scaling.last_failure, out)
        self._scaling.launch_for_held(now, out)

    def _scale_requested(self, event: ScaleRequested, now: float, out: list[Action]) -> None:
        self._scaling.requested(event.num_instances, now, out)

    # Migration.

    def _migration_finished(self, event: MigrationFinished, now: float, out: list[Action]) -> None:
        self._rebalancer.finished(event, now)
        self._session_moves.finished(event, now)
        self._dispatcher.dispatch_held(now, out)
        self._instances.leave_if_empty(event.source, now, out)
        self._instances.leave_if_empty(event.destination, now, out)

    def _migration_requested(
        self, event: MigrationRequested, now: float, out: list[Action]
    ) -> None:
        if event.session_id is not None:
            found = self._session_moves.last_turn(event.session_id, now)
            if found is None:
                reason = (
                    f"no session {event.session_id!r} is remembered: none had it, or its last turn "
                    f"was more than session_ttl_s={self.options.session_ttl_s:g} s ago"
                )
                out.append(RefuseMigration(request_id=event.request_id, reason=reason))
                return
            key, home = found
            if home.request_id not in self._ledger.requests:
                self._session_moves.request(event, key, home, now, out)
                return
            event = replace(event, request_id=home.request_id)
        self._rebalancer.request(event, now, out)

    # Prefix blocks: ignored unless the bundle keeps an index.

    def _blocks_stored(self, event: KvBlocksStored, now: float, out: list[Action]) -> None:
        if self._prefix_index is not None:
            self._prefix_index.store(event.instance_id, event.block_hashes)

    def _blocks_removed(self, event: KvBlocksRemoved, now: float, out: list[Action]) -> None:
        if self._prefix_index is not None:
            self._prefix_index.remove(event.instance_id, event.block_hashes)

    def _cache_cleared(self, event: KvCacheCleared, now: float, out: list[Action]) -> None:
        if self._prefix_index is not None:
            self._prefix_index.clear(event.instance_id)

    # Time.

    def _ticked(self, event: Ticked, now: float, out: list[Action]) -> None:
        has_failed = self._scaling.give_up_launches(now)
        self._dispatcher.expire(now, self._scaling.last_failure, out, has_failed=has_failed)
        self._session_moves.tick(now)
        self._instances.tick(now, out)
        self._scaling.tick(now, out)
        self._rebalancer.tick(now, out)
        self._dispatcher.dispatch_held(now, out)
