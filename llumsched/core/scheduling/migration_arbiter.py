"""Which proposed migrations may start.

Invariants: an instance sends and receives no more than its slots; a request is in one migration;
two instances do not exchange load in both directions, at once or within `migration_settle_s`; where
balance is the aim, an instance does not give and take at once, and a pair starts only if the move
narrows the gap between the two, so it never merely swaps their roles.
This module does not know why a migration was proposed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llumsched.core.codec import from_plain, to_plain
from llumsched.core.events import MigrationOutcome
from llumsched.core.options import SchedulerOptions
from llumsched.core.scheduling.cluster_state import Cluster, InstanceRecord
from llumsched.core.types import InstanceState, PriorityClass


@dataclass(slots=True, kw_only=True, eq=False)
class ActiveMigration:
    """A migration that was started and whose end was not told yet."""

    migration_id: str
    source: str
    destination: str
    request_id: str | None
    num_blocks: int
    started_s: float
    is_overlaid: bool = True
    """True while no report shows the blocks reserved that the destination expects."""
    has_slot: bool = True
    """False for a request that waits: it holds no KV, so nothing is copied."""
    has_ended: bool = False
    """True for what is cached of a request that has: no load moves."""


class MigrationArbiter:
    """Active migrations, and those that ended too lately to be undone."""

    def __init__(self, cluster: Cluster, options: SchedulerOptions) -> None:
        self._cluster = cluster
        self._options = options
        self._next_id = 0
        self._rests_until: dict[tuple[str, str | None], float] = {}
        self._forget_rests_s = 0.0
        self.active: dict[str, ActiveMigration] = {}
        self._by_instance: dict[str, dict[str, ActiveMigration]] = {}

    def blocked(
        self, source: InstanceRecord, destination: InstanceRecord, now: float
    ) -> str | None:
        """Why nothing can move between the two at all, or None."""
        if source is destination:
            return f"destination equals source ({source.spec.instance_id})"
        if source.state is InstanceState.GONE:
            return f"source {source.spec.instance_id} is gone"
        if destination.state is not InstanceState.SERVING:
            return f"destination {destination.spec.instance_id} is {destination.state.value}"
        for end, record in (("source", source), ("destination", destination)):
            if not record.is_fresh:
                silent_s = now - record.last_report_s
                return (
                    f"{end} {record.spec.instance_id} is stale: "
                    f"it has not reported for {silent_s:.1f} s"
                )
        if source.num_migrations_out >= self._options.max_migrations_out:
            return _no_slot("sends", source, source.num_migrations_out)
        if destination.num_migrations_in >= self._options.max_migrations_in:
            return _no_slot("receives", destination, destination.num_migrations_in)
        return None

    def destination_for(
        self, source: InstanceRecord, wanted: str | None, now: float
    ) -> InstanceRecord | str:
        """Where an operator's wish takes something: the instance named, or the freest that can
        receive; or the reason why it cannot."""
        records, snapshot = self._cluster.records, self._cluster.snapshot
        if wanted is not None:
            found = records.get(wanted)
            if found is None:
                known = ", ".join(snapshot.instance_ids)
                return f"unknown destination {wanted!r}; instances: {known}"
            blocked = self.blocked(source, found, now)
            return found if blocked is None else blocked
        freeness, rows = snapshot.columns.freeness, snapshot.rows
        able = [i for i in snapshot.instance_ids if self.blocked(source, records[i], now) is None]
        if not able:
            return "no other instance can receive a migration now"
        return records[max(able, key=lambda i: freeness[rows[i]])]

    def unwise(
        self, source: InstanceRecord, destination: InstanceRecord, balances: bool, now: float
    ) -> str | None:
        """Why a policy's proposal is refused where an operator's wish would be carried out."""
        source_id, destination_id = source.spec.instance_id, destination.spec.instance_id
        rests = self._rests_until
        if now < rests.get((destination_id, source_id), -math.inf):
            return f"{destination_id} has just given load to {source_id}"
        if now < rests.get((source_id, None), -math.inf):
            return f"{source_id} has just had nothing to move"
        if any(m.source == destination_id for m in self._between(source_id, destination_id)):
            return f"{destination_id} is giving load to {source_id}"
        if source.state is InstanceState.DRAINING:
            return None
        if not source.load.num_running:
            return f"source {source.spec.instance_id} runs nothing"
        if balances and source.num_migrations_in:
            return f"source {source_id} is taking load in"
        if balances and destination.num_migrations_out:
            return f"destination {destination_id} is giving load away"
        if balances and _only_swaps(self._cluster, source, destination):
            return "the move would only swap the roles of source and destination"
        return None

    def start(
        self,
        source: InstanceRecord,
        destination: InstanceRecord,
        request_id: str | None,
        num_blocks: int,
        now: float,
        *,
        has_slot: bool = True,
        has_ended: bool = False,
    ) -> ActiveMigration:
        """Take the slots and overlay the destination."""
        self._next_id += 1
        migration = ActiveMigration(
            migration_id=f"m{self._next_id}",
            source=source.spec.instance_id,
            destination=destination.spec.instance_id,
            request_id=request_id,
            num_blocks=num_blocks,
            started_s=now,
            has_slot=has_slot,
            has_ended=has_ended,
        )
        self._add(migration)
        self._overlay(migration)
        return migration

    def _add(self, migration: ActiveMigration) -> None:
        self.active[migration.migration_id] = migration
        for instance_id in (migration.source, migration.destination):
            self._by_instance.setdefault(instance_id, {})[migration.migration_id] = migration
        if migration.has_slot:
            self._cluster.add_migration_out(self._cluster.records[migration.source], 1)
            self._cluster.add_migration_in(self._cluster.records[migration.destination], 1)

    def _overlay(self, migration: ActiveMigration) -> None:
        self._cluster.add_sent(
            self._cluster.records[migration.destination],
            num_blocks=migration.num_blocks,
            num_tokens=0,
            priority=PriorityClass.NORMAL,
        )

    def finish(self, migration: ActiveMigration, outcome: MigrationOutcome, now: float) -> None:
        """Give the slots back, and remember what must not be tried again at once."""
        del self.active[migration.migration_id]
        for instance_id in (migration.source, migration.destination):
            on_instance = self._by_instance[instance_id]
            del on_instance[migration.migration_id]
            if not on_instance:
                del self._by_instance[instance_id]
        source = self._cluster.records.get(migration.source)
        destination = self._cluster.records.get(migration.destination)
        if source is not None and migration.has_slot:
            self._cluster.add_migration_out(source, -1)
        if destination is not None:
            if migration.has_slot:
                self._cluster.add_migration_in(destination, -1)
            self._drop_overlay(migration, destination)
        rests = self._rests_until
        until = now + self._options.migration_settle_s
        if now >= self._forget_rests_s:
            self._forget_rests_s = until
            for pair in [pair for pair, until in rests.items() if until <= now]:
                del rests[pair]
        if not migration.has_slot or migration.has_ended:
            return
        if outcome is MigrationOutcome.COMMITTED:
            rests[(migration.source, migration.destination)] = until
        elif outcome is MigrationOutcome.NOTHING_TO_MOVE and migration.request_id is None:
            rests[(migration.source, None)] = until

    def reported(self, destination: InstanceRecord) -> None:
        """A report shows `num_migrations_in` reservations: the oldest overlays are those."""
        visible = destination.load.num_migrations_in
        instance_id = destination.spec.instance_id
        incoming = [m for m in self.involving(instance_id) if m.destination == instance_id]
        for migration in incoming[:visible]:
            self._drop_overlay(migration, destination)

    def involving(self, instance_id: str) -> list[ActiveMigration]:
        """Active migrations an instance takes part in, oldest first."""
        return list(self._by_instance.get(instance_id, {}).values())

    def _between(self, source: str, destination: str) -> list[ActiveMigration]:
        if not (source in self._by_instance and destination in self._by_instance):
            return []
        return [m for m in self.involving(source) if destination in (m.source, m.destination)]

    def arrived(self, migration: ActiveMigration, request_id: str) -> None:
        """A report of the destination names the request: its numbers count it."""
        migration.request_id = request_id
        destination = self._cluster.records.get(migration.destination)
        if destination is not None:
            self._drop_overlay(migration, destination)

    def overdue(self, now: float) -> list[ActiveMigration]:
        """Migrations whose end should have been told by now."""
        limit = now - self._options.migration_timeout_s
        return [m for m in self.active.values() if m.started_s <= limit]

    def next_deadline(self) -> float | None:
        """When the oldest active migration is overdue."""
        for migration in self.active.values():
            return migration.started_s + self._options.migration_timeout_s
        return None

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "next_id": self._next_id,
            "active": [to_plain(migration) for migration in self.active.values()],
            "rests_until": [[*pair, until] for pair, until in self._rests_until.items()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; the instances are there already."""
        for data in state["active"]:
            migration = from_plain(ActiveMigration, data)
            self._add(migration)
            if migration.is_overlaid:
                self._overlay(migration)
        self._next_id = state["next_id"]
        self._rests_until = {(a, b): until for a, b, until in state["rests_until"]}

    def _drop_overlay(self, migration: ActiveMigration, destination: InstanceRecord) -> None:
        if migration.is_overlaid:
            migration.is_overlaid = False
            self._cluster.remove_sent(
                destination,
                num_blocks=migration.num_blocks,
                num_tokens=0,
                priority=PriorityClass.NORMAL,
            )


def _no_slot(verb: str, record: InstanceRecord, in_use: int) -> str:
    return (
        f"{record.spec.instance_id} already {verb} {in_use} migration(s), "
        "its limit; try again when one has ended"
    )


def _only_swaps(cluster: Cluster, source: InstanceRecord, destination: InstanceRecord) -> bool:
    """True if after the move the destination is no freer than the source was before."""
    columns = cluster.snapshot.columns
    rows = cluster.snapshot.rows
    row_s, row_d = rows[source.spec.instance_id], rows[destination.spec.instance_id]
    free_d = columns.num_total_blocks.item(row_d) - columns.virtual_usage.item(row_d)
    victim_blocks = columns.victim_blocks.item(row_s)
    after: float = (free_d - victim_blocks) / (columns.batch_size.item(row_d) + 1)
    return after <= columns.freeness.item(row_s)
