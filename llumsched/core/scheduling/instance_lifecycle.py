"""The life of an instance in the scheduler: join, report, drain, leave.

    InstanceJoined -> serving -> draining -> gone (TerminateInstance) -> InstanceLost
                         any state -------------------------------------^

Invariants: a draining instance leaves, empty or at its deadline; when an instance is lost its
requests are held again and its migrations are over; an instance that is gone is given nothing.
This module does not decide that an instance should drain (`scaling`, or an operator).
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from llumsched.core.actions import Action, TerminateInstance
from llumsched.core.codec import from_plain, to_plain
from llumsched.core.events import InstanceJoined
from llumsched.core.load import InstanceLoad, InstanceSpec
from llumsched.core.options import SchedulerOptions
from llumsched.core.scheduling.cluster_state import Cluster, InstanceRecord
from llumsched.core.scheduling.cost_model import LearnedCosts
from llumsched.core.scheduling.dispatcher import Dispatcher
from llumsched.core.scheduling.migration_arbiter import MigrationArbiter
from llumsched.core.scheduling.prefix_index import PrefixIndex
from llumsched.core.scheduling.rebalancer import Rebalancer
from llumsched.core.scheduling.request_ledger import Ledger
from llumsched.core.scheduling.session_moves import SessionMoves
from llumsched.core.types import InstanceState


class InstanceLifecycles:
    """Takes instances in, follows their reports, and lets them go."""

    def __init__(
        self,
        *,
        options: SchedulerOptions,
        cluster: Cluster,
        ledger: Ledger,
        dispatcher: Dispatcher,
        rebalancer: Rebalancer,
        arbiter: MigrationArbiter,
        session_moves: SessionMoves,
        prefix_index: PrefixIndex | None,
    ) -> None:
        self._options = options
        self._cluster = cluster
        self._ledger = ledger
        self._dispatcher = dispatcher
        self._rebalancer = rebalancer
        self._arbiter = arbiter
        self._session_moves = session_moves
        self._prefix_index = prefix_index
        self._draining: dict[str, InstanceRecord] = {}

    @property
    def draining(self) -> Collection[str]:
        """Ids of the instances that are being emptied."""
        return self._draining.keys()

    def join(self, event: InstanceJoined, now: float) -> None:
        """Take in an instance; one that joins again has lost what it does not name."""
        instance_id = event.spec.instance_id
        self.lose(instance_id, now)
        instance = self._cluster.join(event.spec, now)
        if self._prefix_index is not None:
            self._prefix_index.add_instance(instance_id)
        for request_id in event.request_ids:
            self._dispatcher.adopt(request_id, instance, now)
        self._rebalancer.membership_changed(now)

    def lose(self, instance_id: str, now: float) -> None:
        """Forget an instance; its requests are held again."""
        if instance_id not in self._cluster.records:
            return
        self._rebalancer.lost(instance_id, now)
        for record in self._ledger.on(instance_id):
            self._dispatcher.hold_again(record, now)
        self._draining.pop(instance_id, None)
        self._session_moves.forget_instance(instance_id)
        self._cluster.remove(instance_id)
        if self._prefix_index is not None:
            self._prefix_index.remove_instance(instance_id)
        self._rebalancer.membership_changed(now)

    def report(self, load: InstanceLoad, now: float, out: list[Action]) -> None:
        """Reconcile the ledger with a load report."""
        instance = self._cluster.records.get(load.instance_id)
        if instance is None:
            return
        instance_id = load.instance_id
        requests = self._ledger.requests
        for request_id in load.received_request_ids:
            record = requests.get(request_id)
            if record is None:
                continue
            if record.instance_id == instance_id:
                self._ledger.reported(record, instance, now)
            elif record.instance_id is not None:
                self._rebalancer.received(record, instance, now)
        # A report that was overtaken still names requests, but its numbers are old.
        if load.sequence > instance.load.sequence:
            self._cluster.report(instance, load, now)
            if load.progress:
                self._ledger.progressed(load)
            if load.num_migrations_in:
                self._arbiter.reported(instance)
            if not (load.num_running or load.num_waiting):
                self._forget_ghosts(instance, now, out)
        else:
            self._cluster.publish_sent(instance)
        for request_id in load.finished_request_ids:
            record = requests.get(request_id)
            if record is not None and record.instance_id == instance_id:
                self._dispatcher.end(record, None, out)
        if self._draining:
            self.leave_if_empty(instance_id, now, out)

    def _forget_ghosts(self, instance: InstanceRecord, now: float, out: list[Action]) -> None:
        """An empty instance runs none of the requests it once named: their end was not told."""
        instance_id = instance.spec.instance_id
        if not self._ledger.num_on(instance_id) or self._arbiter.involving(instance_id):
            return
        for record in self._ledger.on(instance_id):
            # The margin is for what is named on its way into the engine, before it waits there.
            if record.named_s is not None and now - record.named_s > self._options.stale_after_s:
                self._dispatcher.end(record, None, out)

    def state(self) -> list[dict[str, Any]]:
        """Every instance, for a checkpoint."""
        return [
            {
                "spec": to_plain(record.spec),
                "load": to_plain(record.load),
                "costs": to_plain(record.costs),
                "last_report_s": record.last_report_s,
                "is_fresh": record.is_fresh,
                "state": record.state.value,
                "drain_by_s": record.drain_by_s if instance_id in self._draining else None,
            }
            for instance_id, record in self._cluster.records.items()
        ]

    def restore(self, state: Iterable[Mapping[str, Any]], now: float) -> None:
        """Go on from a checkpoint, before its requests and migrations are restored."""
        for entry in state:
            spec = from_plain(InstanceSpec, entry["spec"])
            self.join(InstanceJoined(spec=spec), now)
            record = self._cluster.records[spec.instance_id]
            load = from_plain(InstanceLoad, entry["load"])
            costs = from_plain(LearnedCosts, entry["costs"])
            self._cluster.restore(record, load, entry["last_report_s"], entry["is_fresh"], costs)
            if entry["state"] != InstanceState.SERVING:
                self._cluster.set_state(record, InstanceState(entry["state"]))
            if entry["drain_by_s"] is not None:
                record.drain_by_s = entry["drain_by_s"]
                self._draining[spec.instance_id] = record

    def drain(
        self, instance_id: str, deadline_s: float | None, now: float, out: list[Action]
    ) -> None:
        """Give an instance nothing more; it leaves when empty, at the latest at the deadline."""
        instance = self._cluster.records.get(instance_id)
        if instance is None or instance.state is InstanceState.GONE:
            return
        limit_s = self._options.drain_timeout_s if deadline_s is None else deadline_s
        instance.drain_by_s = min(instance.drain_by_s, now + limit_s)
        if instance.state is InstanceState.SERVING:
            self._draining[instance_id] = instance
            self._cluster.set_state(instance, InstanceState.DRAINING)
        self.leave_if_empty(instance_id, now, out)

    def leave_if_empty(self, instance_id: str, now: float, out: list[Action]) -> None:
        """Let a draining instance go once nothing is on it, by its word and by the ledger, and the
        KV of its sessions has had some time to leave."""
        instance = self._draining.get(instance_id)
        if instance is None:
            return
        load = instance.load
        if load.num_running or load.num_waiting or self._ledger.num_on(instance_id):
            return
        if not (
            self._session_moves.evacuate(instance_id, now, out)
            or self._arbiter.involving(instance_id)
        ):
            self._terminate(instance, "drained", out)

    def next_deadline(self) -> float | None:
        """When the next draining instance must leave."""
        return min((i.drain_by_s for i in self._draining.values()), default=None)

    def tick(self, now: float, out: list[Action]) -> None:
        """Let draining instances go whose deadline has come."""
        for instance_id, instance in list(self._draining.items()):
            self.leave_if_empty(instance_id, now, out)
            if instance.state is InstanceState.DRAINING and now >= instance.drain_by_s:
                num_left = self._ledger.num_on(instance_id)
                self._terminate(instance, f"drain deadline passed, requests left: {num_left}", out)

    def _terminate(self, instance: InstanceRecord, reason: str, out: list[Action]) -> None:
        del self._draining[instance.spec.instance_id]
        self._cluster.set_state(instance, InstanceState.GONE)
        out.append(TerminateInstance(instance_id=instance.spec.instance_id, reason=reason))
