"""The global scheduler: one event in, the actions it leads to out.

It owns all mutable state (cluster, ledger, queue, arbitration) and wires the parts together; the
decisions are the policies' and the parts'.

Invariants: the same events at the same times give the same actions; `handle` never blocks and never
raises because of a policy; time never runs backwards inside. It does not know the host: what it
wants done it returns, when it wants to be woken it says in `next_deadline`.
"""

import random
from collections.abc import Callable
from typing import Any

from llumsched.core.actions import Action, TerminateInstance
from llumsched.core.arbitration import MigrationArbiter
from llumsched.core.cluster import Cluster, InstanceRecord
from llumsched.core.dispatch_queue import DispatchQueue
from llumsched.core.dispatching import Dispatcher
from llumsched.core.events import (
    DrainRequested,
    Event,
    InstanceJoined,
    InstanceLost,
    LoadReported,
    MigrationFinished,
    MigrationRequested,
    RequestAborted,
    RequestArrived,
    RequestFinished,
    Ticked,
)
from llumsched.core.ledger import Ledger
from llumsched.core.load import Headroom, InstanceLoad
from llumsched.core.options import SchedulerOptions
from llumsched.core.policy import PolicyBundle
from llumsched.core.rebalancing import Rebalancer
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.core.types import InstanceState, SchedulingRequest


class GlobalScheduler:
    """See the module docstring. `options` defaults to what the bundle asks for."""

    def __init__(
        self, bundle: PolicyBundle, options: SchedulerOptions | None = None, seed: int = 0
    ) -> None:
        self.bundle = bundle
        self.options = options if options is not None else bundle.options
        self._now = 0.0
        self._queue = DispatchQueue()
        self._cluster = Cluster(
            headroom=Headroom(target_load=self.options.high_priority_target_load),
            stale_after_s=self.options.stale_after_s,
            rng=random.Random(seed),
            held=self._held,
        )
        self._ledger = Ledger(self._cluster)
        self._dispatcher = Dispatcher(
            bundle=bundle,
            options=self.options,
            cluster=self._cluster,
            ledger=self._ledger,
            queue=self._queue,
        )
        self._arbiter = MigrationArbiter(self._cluster, self.options)
        self._rebalancer = Rebalancer(
            policy=bundle.migration,
            options=self.options,
            cluster=self._cluster,
            ledger=self._ledger,
            dispatcher=self._dispatcher,
            arbiter=self._arbiter,
        )
        self._handlers: dict[type, Callable[[Any, float, list[Action]], None]] = {
            InstanceJoined: self._joined,
            InstanceLost: self._lost,
            LoadReported: self._load_reported,
            RequestArrived: self._arrived,
            RequestFinished: self._finished,
            RequestAborted: self._aborted,
            MigrationFinished: self._migration_finished,
            MigrationRequested: self._migration_requested,
            DrainRequested: self._drain_requested,
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
        self._now = now = max(now, self._now)
        out: list[Action] = []
        handler(event, now, out)
        return tuple(out)

    def next_deadline(self) -> float | None:
        """When `Ticked` must come, if nothing else happens before; None: never."""
        deadlines = [
            self._queue.next_deadline(),
            self._rebalancer.next_deadline(),
            *(r.drain_by_s for r in self._draining()),
        ]
        return min((d for d in deadlines if d is not None), default=None)

    def snapshot(self, now: float) -> ClusterSnapshot:
        """A copy of the cluster as policies see it, to keep."""
        return self._cluster.at(max(now, self._now)).detached()

    def request_instance(self, request_id: str) -> str | None:
        """The instance a request is on; None while it is queued, or if it is unknown."""
        record = self._ledger.requests.get(request_id)
        return None if record is None else record.instance_id

    def _held(self) -> tuple[SchedulingRequest, ...]:
        limit = self.options.max_queue_attempts
        return tuple(record.request for record in self._queue.in_order(limit))

    # Requests.

    def _arrived(self, event: RequestArrived, now: float, out: list[Action]) -> None:
        self._dispatcher.arrive(event.request, now, out)

    def _finished(self, event: RequestFinished, now: float, out: list[Action]) -> None:
        self._end(event.request_id, event.num_output_tokens, now, out)

    def _aborted(self, event: RequestAborted, now: float, out: list[Action]) -> None:
        self._end(event.request_id, None, now, out)

    def _end(
        self, request_id: str, num_output_tokens: int | None, now: float, out: list[Action]
    ) -> None:
        instance_id = self.request_instance(request_id)
        self._dispatcher.end(request_id, num_output_tokens, out)
        self._dispatcher.dispatch_held(now, out)
        if instance_id is not None:
            self._leave_if_empty(self._cluster.records[instance_id], out)

    # Instances.

    def _joined(self, event: InstanceJoined, now: float, out: list[Action]) -> None:
        if event.spec.instance_id in self._cluster.records:
            self._lost(
                InstanceLost(instance_id=event.spec.instance_id, reason="it joined anew"), now, out
            )
        instance = self._cluster.join(event.spec, now)
        self._rebalancer.membership_changed(now)
        for request_id in event.request_ids:
            if request_id not in self._ledger.requests:
                request = SchedulingRequest(request_id=request_id, num_prompt_tokens=0)
                self._ledger.place(self._ledger.open(request, now), instance, overlay=False)
        self._dispatcher.dispatch_held(now, out)

    def _lost(self, event: InstanceLost, now: float, out: list[Action]) -> None:
        if event.instance_id not in self._cluster.records:
            return
        self._rebalancer.lost(event.instance_id, now)
        for record in self._ledger.on(event.instance_id):
            self._dispatcher.hold_again(record, now)
        self._cluster.remove(event.instance_id)
        self._rebalancer.membership_changed(now)
        self._dispatcher.dispatch_held(now, out)

    def _load_reported(self, event: LoadReported, now: float, out: list[Action]) -> None:
        load = event.load
        instance = self._cluster.records.get(load.instance_id)
        if instance is None:
            return
        requests = self._ledger.requests
        for request_id in load.received_request_ids:
            record = requests.get(request_id)
            if record is None:
                continue
            if record.instance_id == load.instance_id:
                self._ledger.reported(record, now)
            elif record.instance_id is not None:
                self._rebalancer.received(record, instance, now)
        # A report that was overtaken still names requests, but its numbers are old.
        if load.sequence > instance.load.sequence:
            self._cluster.report(instance, load, now)
            self._arbiter.reported(instance)
            self._forget_ghosts(instance, load, now, out)
        for request_id in load.finished_request_ids:
            record = requests.get(request_id)
            if record is not None and record.instance_id == load.instance_id:
                self._dispatcher.end(request_id, None, out)
        self._dispatcher.dispatch_held(now, out)
        self._leave_if_empty(instance, out)

    def _forget_ghosts(
        self, instance: InstanceRecord, load: InstanceLoad, now: float, out: list[Action]
    ) -> None:
        """An empty instance runs none of the requests it took long ago: their end was not told."""
        if load.num_running or load.num_waiting or self._arbiter.involving(load.instance_id):
            return
        for record in self._ledger.on(load.instance_id):
            if not record.is_unreported and now - record.reported_s > self.options.stale_after_s:
                self._dispatcher.end(record.request.request_id, None, out)

    # Draining.

    def _draining(self) -> list[InstanceRecord]:
        return [r for r in self._cluster.records.values() if r.state is InstanceState.DRAINING]

    def _drain_requested(self, event: DrainRequested, now: float, out: list[Action]) -> None:
        instance = self._cluster.records.get(event.instance_id)
        if instance is None or instance.state is InstanceState.GONE:
            return
        limit_s = self.options.drain_timeout_s if event.deadline_s is None else event.deadline_s
        instance.drain_by_s = min(instance.drain_by_s, now + limit_s)
        if instance.state is InstanceState.SERVING:
            self._cluster.set_state(instance, InstanceState.DRAINING)
        self._leave_if_empty(instance, out)

    def _leave_if_empty(self, instance: InstanceRecord, out: list[Action]) -> None:
        instance_id = instance.spec.instance_id
        if (
            instance.state is InstanceState.DRAINING
            and not instance.load.num_running
            and not instance.load.num_waiting
            and not self._ledger.num_on(instance_id)
            and not self._arbiter.involving(instance_id)
        ):
            self._terminate(instance, "drained", out)

    def _terminate(self, instance: InstanceRecord, reason: str, out: list[Action]) -> None:
        self._cluster.set_state(instance, InstanceState.GONE)
        out.append(TerminateInstance(instance_id=instance.spec.instance_id, reason=reason))

    # Migration.

    def _migration_finished(self, event: MigrationFinished, now: float, out: list[Action]) -> None:
        self._rebalancer.finished(event, now)
        self._dispatcher.dispatch_held(now, out)
        source = self._cluster.records.get(event.source)
        if source is not None:
            self._leave_if_empty(source, out)

    def _migration_requested(
        self, event: MigrationRequested, now: float, out: list[Action]
    ) -> None:
        self._rebalancer.request(event, now, out)

    # Time.

    def _ticked(self, event: Ticked, now: float, out: list[Action]) -> None:
        self._dispatcher.expire(now, out)
        for instance in self._draining():
            self._leave_if_empty(instance, out)
            if instance.state is InstanceState.DRAINING and now >= instance.drain_by_s:
                num_left = self._ledger.num_on(instance.spec.instance_id)
                self._terminate(instance, f"drain deadline passed with {num_left} requests", out)
        self._rebalancer.tick(now, out)
        self._dispatcher.dispatch_held(now, out)
