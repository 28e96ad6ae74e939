"""Migrations from the scheduler's side: propose pairs, start what may start, learn how it ended.

Invariants: a `StartMigration` is emitted only for what `migration_arbiter` allows, or for requests
that wait, of which nothing is copied; a request is on the destination from the moment its commit is
known, by the source's word or by a load report of the destination. This module does not know which
running request moves: the source picks it.
"""

from itertools import islice

from llumsched.core.actions import Action, RefuseMigration, StartMigration
from llumsched.core.events import MigrationFinished, MigrationOutcome, MigrationRequested
from llumsched.core.options import SchedulerOptions
from llumsched.core.policy import MigrationPair, MigrationPolicy
from llumsched.core.scheduling.answer_checks import malformed, policy_failed
from llumsched.core.scheduling.cluster_state import Cluster, InstanceRecord
from llumsched.core.scheduling.dispatcher import Dispatcher
from llumsched.core.scheduling.migration_arbiter import MigrationArbiter
from llumsched.core.scheduling.request_ledger import Ledger, RequestRecord
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.core.types import InstanceState

MOST_RELIEVED = 256
"""Requests that one newcomer takes over at once."""


class Rebalancer:
    """Carries the migration policy's proposals through arbitration."""

    def __init__(
        self,
        *,
        policy: MigrationPolicy | None,
        options: SchedulerOptions,
        cluster: Cluster,
        ledger: Ledger,
        dispatcher: Dispatcher,
        arbiter: MigrationArbiter,
    ) -> None:
        self._policy = policy
        self._options = options
        self._cluster = cluster
        self._ledger = ledger
        self._dispatcher = dispatcher
        self._arbiter = arbiter
        self.next_s: float | None = None
        """When the next decision is due; None with fewer than two instances."""

    def membership_changed(self, now: float) -> None:
        """Decisions are periodic from the moment there are two instances."""
        if self._policy is None or len(self._cluster.records) < 2:
            self.next_s = None
        elif self.next_s is None:
            self.next_s = now + self._options.migration_interval_s

    def next_deadline(self) -> float | None:
        """When the next decision, or the end of an overdue migration, is due."""
        overdue = self._arbiter.next_deadline()
        if self.next_s is None or overdue is None:
            return overdue if self.next_s is None else self.next_s
        return min(self.next_s, overdue)

    def tick(self, now: float, out: list[Action]) -> None:
        """Give up overdue migrations; decide, if it is time."""
        for migration in self._arbiter.overdue(now):
            self._arbiter.finish(migration, MigrationOutcome.ABORTED, now)
        if self._policy is not None and self.next_s is not None and now >= self.next_s:
            self.next_s = now + self._options.migration_interval_s
            self._decide(self._policy, now, out)

    def _decide(self, policy: MigrationPolicy, now: float, out: list[Action]) -> None:
        cluster = self._cluster.at(now)
        room = self._options.max_migrations_per_decision - self._start_planned(now, out)
        seen: set[tuple[str, str]] = set()
        try:
            # Bounded: a policy must not keep the scheduler by yielding for ever.
            pairs = list(islice(policy.rebalance(cluster), 4 * len(cluster)))
        except Exception as error:
            out.append(policy_failed(policy, error))
            return
        for pair in pairs:
            problem = _problem(pair, cluster, seen)
            if problem is not None:
                out.append(policy_failed(policy, problem))
                continue
            seen.add((pair.source, pair.destination))
            room -= self._start_pair(pair, room, now, out)
            if room <= 0:
                return

    def _start_pair(self, pair: MigrationPair, limit: int, now: float, out: list[Action]) -> int:
        """Start what may start of a pair; how many that were."""
        source = self._cluster.records[pair.source]
        destination = self._cluster.records[pair.destination]
        snapshot = self._cluster.snapshot
        if pair.request_id is not None:
            return self._start_named(pair, pair.request_id, source, destination, now, out)
        num_blocks = int(snapshot.columns.victim_blocks[snapshot.rows[pair.source]])
        limit = min(limit, pair.num_requests)
        for num_started in range(limit):
            if (
                self._arbiter.blocked(source, destination, now) is not None
                or self._arbiter.unwise(source, destination, pair.balances, now) is not None
            ):
                return num_started
            self._start(source, destination, None, num_blocks, pair.reason, now, out, pair=pair)
        return limit

    def _start_named(
        self,
        pair: MigrationPair,
        request_id: str,
        source: InstanceRecord,
        destination: InstanceRecord,
        now: float,
        out: list[Action],
    ) -> int:
        """Start the move of the request that a policy named, if it may start; 1 if it did."""
        record = self._ledger.requests.get(request_id)
        if (
            record is None
            or record.instance_id != pair.source
            or now < record.rests_until_s
            or self._arbiter.blocked(source, destination, now) is not None
            or any(m.request_id == request_id for m in self._arbiter.involving(pair.source))
        ):
            return 0
        # If it refuses, it is not asked again at every decision.
        record.rests_until_s = now + self._options.migration_interval_s
        computed, _ = record.progress_at(source.load.num_decode_steps)
        num_tokens = max(computed, record.request.num_prompt_tokens)
        num_blocks = -(-num_tokens // destination.spec.block_size)
        self._start(source, destination, request_id, num_blocks, pair.reason, now, out, pair=pair)
        return 1

    def _start_planned(self, now: float, out: list[Action]) -> int:
        """Start the planned hand-overs whose time has come; how many those were."""
        num_started = 0
        for request_id, record in list(self._ledger.planned.items()):
            if record.instance_id is None or record.hand_over_to is None:
                continue
            source = self._cluster.records[record.instance_id]
            _, num_outputs = record.progress_at(source.load.num_decode_steps)
            destination = self._cluster.records.get(record.hand_over_to)
            if num_outputs < record.hand_over_after:
                continue
            if destination is None or destination is source:
                del self._ledger.planned[request_id]
                continue
            pair = MigrationPair(
                source=record.instance_id,
                destination=record.hand_over_to,
                reason=f"planned after {record.hand_over_after} tokens, it has {num_outputs}",
                balances=False,
            )
            started = self._start_named(pair, request_id, source, destination, now, out)
            if started:
                del self._ledger.planned[request_id]
            num_started += started
        return num_started

    def relieve(self, newcomer: InstanceRecord, now: float, out: list[Action]) -> None:
        """Send a newcomer its share of what waits elsewhere.

        The share is what fits into half of its blocks, the longest waiting first (the other half is
        for what they become); or, of a longer queue, one in as many as there are instances, so that
        old and new ones wait alike everywhere. Which of an instance's requests wait follows from
        their number: those that came last.
        """
        if self._policy is None or not self._options.relieve_waiting:
            return
        waiting = self._waiting_elsewhere(newcomer)
        if not waiting:
            return
        serving = self._cluster.at(now).num_accepting
        share = waiting[:: max(1, serving)]
        fitting = waiting[: self._num_fitting(newcomer, waiting)]
        for record, source in max(share, fitting, key=len)[:MOST_RELIEVED]:
            num_blocks = record.request.num_prompt_blocks(newcomer.spec.block_size)
            reason = f"it waits, and {newcomer.spec.instance_id} has just joined"
            request_id = record.request.request_id
            self._start(source, newcomer, request_id, num_blocks, reason, now, out, has_slot=False)

    def _num_fitting(
        self, newcomer: InstanceRecord, waiting: list[tuple[RequestRecord, InstanceRecord]]
    ) -> int:
        """How many of these fit into half of its blocks, and into its batch."""
        columns, rows = self._cluster.snapshot.columns, self._cluster.snapshot.rows
        row = rows[newcomer.spec.instance_id]
        room = int(columns.num_free_blocks[row]) - int(columns.num_total_blocks[row]) // 2
        places = max(0, newcomer.spec.max_num_seqs - int(columns.num_requests[row]))
        for number, (record, _) in enumerate(waiting[:places]):
            room -= record.request.num_prompt_blocks(newcomer.spec.block_size)
            if room < 0:
                return number
        return min(places, len(waiting))

    def _waiting_elsewhere(
        self, newcomer: InstanceRecord
    ) -> list[tuple[RequestRecord, InstanceRecord]]:
        moving = {migration.request_id for migration in self._arbiter.active.values()}
        found = []
        for instance_id, source in self._cluster.records.items():
            if source is newcomer or not source.is_fresh or source.load.num_waiting < 2:
                continue
            # The head of the queue is next where it is.
            on_instance = self._ledger.on(instance_id)
            num_waiting = sum(record.is_unreported for record in on_instance)
            num_waiting += source.load.num_waiting - 1
            found += [
                (record, source)
                for record in on_instance[-num_waiting:]
                if record.request.request_id not in moving
            ]
        return sorted(found, key=lambda pair: pair[0].sequence)

    def request(self, event: MigrationRequested, now: float, out: list[Action]) -> None:
        """Carry out an operator's wish, or refuse it with the reason."""
        self._cluster.at(now)
        record = self._ledger.requests.get(event.request_id)
        answer = self._operator_pair(event, record, now)
        if isinstance(answer, str):
            out.append(RefuseMigration(request_id=event.request_id, reason=answer))
            return
        assert record is not None
        source, destination = answer
        num_blocks = record.request.num_prompt_blocks(destination.spec.block_size)
        self._start(
            source, destination, event.request_id, num_blocks, "asked by an operator", now, out
        )

    def _operator_pair(
        self, event: MigrationRequested, record: RequestRecord | None, now: float
    ) -> tuple[InstanceRecord, InstanceRecord] | str:
        if record is None:
            return f"unknown request {event.request_id!r}: it never arrived, or has ended"
        if record.instance_id is None:
            return f"request {event.request_id!r} is still queued; it is on no instance"
        for migration in self._arbiter.active.values():
            if migration.request_id == event.request_id:
                return (
                    f"request {event.request_id!r} is already migrating to {migration.destination}"
                )
        source = self._cluster.records[record.instance_id]
        destination = self._arbiter.destination_for(source, event.destination, now)
        return destination if isinstance(destination, str) else (source, destination)

    def _start(
        self,
        source: InstanceRecord,
        destination: InstanceRecord,
        request_id: str | None,
        num_blocks: int,
        reason: str,
        now: float,
        out: list[Action],
        *,
        has_slot: bool = True,
        pair: MigrationPair | None = None,
    ) -> None:
        migration = self._arbiter.start(
            source, destination, request_id, num_blocks, now, has_slot=has_slot
        )
        out.append(
            StartMigration(
                migration_id=migration.migration_id,
                source=migration.source,
                destination=migration.destination,
                request_id=request_id,
                reason=reason,
                settle_s=0.0 if request_id is not None else self._options.migration_settle_s,
                expected_win_s=None if pair is None else pair.expected_win_s,
                expected_cost_s=None if pair is None else pair.expected_cost_s,
            )
        )

    def finished(self, event: MigrationFinished, now: float) -> None:
        """Learn from the source how a migration ended; it may have been given up meanwhile."""
        migration = self._arbiter.active.get(event.migration_id)
        is_overlaid = migration is None or migration.is_overlaid
        if migration is not None:
            self._arbiter.finish(migration, event.outcome, now)
        if event.outcome is not MigrationOutcome.COMMITTED or event.request_id is None:
            return
        record = self._ledger.requests.get(event.request_id)
        if record is not None and record.instance_id == event.source:
            self._move(record, event.destination, overlay=is_overlaid, now=now)

    def received(self, record: RequestRecord, destination: InstanceRecord, now: float) -> None:
        """A load report names a request that the ledger has elsewhere: its commit overtook us."""
        instance_id = destination.spec.instance_id
        record.named_by = instance_id
        for migration in self._arbiter.involving(instance_id):
            if (
                migration.destination == instance_id
                and migration.source == record.instance_id
                and migration.request_id in (None, record.request.request_id)
            ):
                self._arbiter.arrived(migration, record.request.request_id)
                self._move(record, instance_id, overlay=False, now=now)
                return

    def lost(self, instance_id: str, now: float) -> None:
        """End every migration an instance that is gone took part in."""
        for migration in self._arbiter.involving(instance_id):
            self._arbiter.finish(migration, MigrationOutcome.ABORTED, now)

    def _move(
        self, record: RequestRecord, destination_id: str, *, overlay: bool, now: float
    ) -> None:
        destination = self._cluster.records.get(destination_id)
        if destination is None:
            self._dispatcher.hold_again(record, now)
            return
        self._ledger.unplace(record)
        overlay = overlay and record.named_by != destination_id
        self._ledger.place(record, destination, now, overlay=overlay)
        record.num_migrations += 1
        record.rests_until_s = now + self._options.migration_settle_s


def _problem(
    pair: MigrationPair, cluster: ClusterSnapshot, seen: set[tuple[str, str]]
) -> str | None:
    wrong_shape = malformed(pair, MigrationPair)
    if wrong_shape is not None:
        return wrong_shape
    key = (pair.source, pair.destination)
    for instance_id in key:
        if instance_id not in cluster.rows:
            return f"proposed unknown instance {instance_id!r}"
    if pair.source == pair.destination:
        return f"proposed to move from {pair.source!r} to itself"
    if pair.num_requests < 1:
        return f"proposed to move {pair.num_requests} requests"
    if pair.request_id is None and key in seen:
        return f"proposed {pair.source!r} to {pair.destination!r} twice"
    state = cluster[pair.destination].state
    if state is not InstanceState.SERVING:
        return f"proposed {pair.destination!r} as destination, which is {state.value}"
    return None
