"""The instances as the scheduler knows them, kept as columns that a snapshot can show at once.

Each change of one instance rewrites one row, so a decision never walks the instances: at a thousand
of them a dispatch is one `argmax`.

Invariants: rows are sorted by instance id; the unreported work of a row is exactly what `add_sent`
put there and `remove_sent` took away; `is_accepting` is true only for a serving instance that was
heard from within `stale_after_s`. This module does not know requests one by one (`ledger`).
"""

import bisect
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llumsched.core.load import Headroom, InstanceLoad, InstanceSpec
from llumsched.core.request_columns import RequestColumns
from llumsched.core.scheduling.cost_model import CostModel, LearnedCosts
from llumsched.core.snapshot import (
    MAX_RISK_EXPONENT,
    ROLES,
    STATES,
    ClusterSnapshot,
    Columns,
    PrefixHolders,
)
from llumsched.core.step_time import DEFAULT_STEP_TIME, StepTimeModel
from llumsched.core.types import InstanceState, PriorityClass, SchedulingRequest

# Members of an enumeration take a look-up at each use, and these are used at every event.
_SERVING = InstanceState.SERVING
_GONE = InstanceState.GONE
_HIGH = int(PriorityClass.HIGH)

_STATE_CODE = {state: code for code, state in enumerate(STATES)}
_ROLE_CODE = {role: code for code, role in enumerate(ROLES)}


# A snapshot is a view, frozen for policies: its owner writes it, here and nowhere else.
_write = object.__setattr__


@dataclass(slots=True, kw_only=True, eq=False)
class InstanceRecord:
    """One instance: its last report, and the sums of what was sent to it since."""

    spec: InstanceSpec
    load: InstanceLoad
    last_report_s: float
    costs: LearnedCosts
    """As they were known when it reported last."""
    is_priced: bool = False
    """False: its cells of `COSTS` are of an earlier load."""
    state: InstanceState = InstanceState.SERVING
    is_fresh: bool = True
    num_sent: int = 0
    num_sent_blocks: int = 0
    num_sent_tokens: int = 0
    num_sent_high: int = 0
    num_high_running: int = 0
    predicted_final_blocks: int = 0
    num_migrations_in: int = 0
    num_migrations_out: int = 0
    drain_by_s: float = math.inf

    def discount_sent(self, num_blocks: int, num_tokens: int, priority: int) -> None:
        """One request (or expected migration) less that was sent and is not reported."""
        self.num_sent -= 1
        self.num_sent_blocks -= num_blocks
        self.num_sent_tokens -= num_tokens
        self.num_sent_high -= priority >= _HIGH


class Cluster:
    """Columns and records of all known instances."""

    def __init__(
        self,
        *,
        headroom: Headroom,
        stale_after_s: float,
        rng: random.Random,
        step_time: StepTimeModel = DEFAULT_STEP_TIME,
        costs: CostModel | None = None,
        reaction_s: float = 1.0,
        held: Callable[[], Sequence[SchedulingRequest]] = tuple,
        queued_s: Callable[[str], float | None] = lambda request_id: None,
        match_prefix: Callable[[SchedulingRequest], Sequence[PrefixHolders]] = lambda request: (),
        requests_on: Callable[[str], RequestColumns] = lambda instance_id: RequestColumns.of((), 0),
    ) -> None:
        self._headroom = headroom
        self._stale_after_s = stale_after_s
        self._rng = rng
        self._costs = costs
        self._shown = LearnedCosts(step_time) if costs is None else costs.latest
        self._reaction_s = reaction_s
        self._queued_s = queued_s
        self._held = held
        self._match_prefix = match_prefix
        self._requests_on = requests_on
        self.records: dict[str, InstanceRecord] = {}
        self._ids: list[str] = []
        self._rows: dict[str, int] = {}
        self._columns = Columns.empty(0)
        self._cells = self._columns.cells()
        self._unpriced: list[InstanceRecord] = []
        # True once a policy has read one of `COSTS`: then they are up to date at each decision.
        self._keeps_costs = False
        self._num_accepting = 0
        # No instance can turn stale before this time; it saves a scan at every event.
        self._next_stale_s = math.inf
        self.num_booting = 0
        # That many come in the place of others, without having been launched from here.
        self.num_replacing = 0
        self.snapshot = self._view(0.0)

    # Membership.

    def join(self, spec: InstanceSpec, now: float) -> InstanceRecord:
        """Add an instance, empty and fresh until its first report says otherwise."""
        load = InstanceLoad(
            instance_id=spec.instance_id,
            sequence=-1,
            num_total_blocks=spec.num_total_blocks,
            num_free_blocks=spec.num_total_blocks,
        )
        record = InstanceRecord(spec=spec, load=load, last_report_s=now, costs=self._shown)
        self._unpriced.append(record)
        row = bisect.bisect_left(self._ids, spec.instance_id)
        self._insert_row(row)
        self._ids.insert(row, spec.instance_id)
        self._number_rows(row)
        self.records[spec.instance_id] = record
        self._columns.block_size[row] = spec.block_size
        self._columns.max_num_seqs[row] = spec.max_num_seqs
        self._columns.max_num_batched_tokens[row] = spec.max_num_batched_tokens
        self._columns.role[row] = _ROLE_CODE[spec.role]
        self._next_stale_s = min(self._next_stale_s, now + self._stale_after_s)
        self._publish_state(record)
        self._publish(record)
        self.snapshot = self._view(now)
        return record

    def remove(self, instance_id: str) -> None:
        """Forget an instance."""
        record = self.records.pop(instance_id)
        row = self._rows.pop(instance_id)
        self._num_accepting -= bool(self._columns.is_accepting[row])
        record.state = InstanceState.GONE
        num_rows = len(self._ids)
        for column in self._columns.arrays():
            column[row : num_rows - 1] = column[row + 1 : num_rows]
        del self._ids[row]
        self._number_rows(row)
        self.snapshot = self._view(self.snapshot.now)

    def _insert_row(self, row: int) -> None:
        num_rows = len(self._ids)
        if num_rows == len(self._columns.state):
            # Room for twice as many, so that joining costs little per instance.
            self._columns = self._columns.padded(max(16, 2 * num_rows))
            self._cells = self._columns.cells()
        for column in self._columns.arrays():
            column[row + 1 : num_rows + 1] = column[row:num_rows]
            column[row] = 0

    def _number_rows(self, first: int) -> None:
        for row in range(first, len(self._ids)):
            self._rows[self._ids[row]] = row

    def _view(self, now: float) -> ClusterSnapshot:
        columns = (
            self._columns.read_only(len(self._ids))
            if self._keeps_costs
            else self._columns.unread(len(self._ids), self._first_read)
        )
        smallest, largest = (
            (int(columns.block_size.min()), int(columns.block_size.max())) if self._ids else (0, 0)
        )
        return ClusterSnapshot(
            now=now,
            instance_ids=tuple(self._ids),
            columns=columns,
            rng=self._rng,
            step_time=self._shown.step_time,
            mean_output_tokens=self._shown.mean_output_tokens,
            reaction_s=self._reaction_s,
            queued_s=self._queued_s,
            num_booting=self.num_booting,
            block_size=smallest if smallest == largest and self._ids else None,
            num_accepting=self._num_accepting,
            max_total_blocks=int(columns.num_total_blocks.max(initial=0)),
            min_total_blocks=int(columns.num_total_blocks.min()) if self._ids else 0,
            rows=self._rows,
            held=self._held,
            match_prefix=self._match_prefix,
            requests_on=self._requests_on,
        )

    # Time and reports.

    def at(self, now: float) -> ClusterSnapshot:
        """The snapshot of this moment: silent instances stop accepting here."""
        if now > self._next_stale_s:
            self._find_stale(now)
        if self._keeps_costs and self._unpriced:
            self._price()
        snapshot = self.snapshot
        _write(snapshot, "now", now)
        if snapshot.fresh_values:
            snapshot.fresh_values.clear()
        return snapshot

    def detached(self, now: float) -> ClusterSnapshot:
        """A copy of the snapshot, to keep; to copy the costs is not to read them for decisions."""
        snapshot = self.at(now)
        if not self._keeps_costs:
            self._price()
            snapshot = replace(snapshot, columns=self._columns.read_only(len(self._ids)))
        return snapshot.detached()

    def _find_stale(self, now: float) -> None:
        last_report_s = self.snapshot.columns.last_report_s
        silent = last_report_s < now - self._stale_after_s
        for row in np.flatnonzero(silent & self.snapshot.columns.is_fresh):
            record = self.records[self._ids[row]]
            record.is_fresh = False
            self._publish_state(record)
        fresh = last_report_s[~silent]
        oldest = float(fresh.min()) if len(fresh) else math.inf
        self._next_stale_s = oldest + self._stale_after_s

    def report(self, record: InstanceRecord, load: InstanceLoad, now: float) -> None:
        """Take in a report that is newer than the last one."""
        if self._costs is not None:
            self._learn(self._costs, record, load, now)
        self._take_in(record, load, now)
        if self._keeps_costs:
            # A policy reads costs: better now than when a request waits for the decision.
            self._price()

    def _take_in(self, record: InstanceRecord, load: InstanceLoad, now: float) -> None:
        total_changed = load.num_total_blocks != record.load.num_total_blocks
        record.load = load
        record.last_report_s = now
        if not record.is_fresh:
            record.is_fresh = True
            self._next_stale_s = min(self._next_stale_s, now + self._stale_after_s)
            self._publish_state(record)
        self._publish(record)
        if total_changed:
            self.snapshot = self._view(now)

    def _learn(
        self, costs: CostModel, record: InstanceRecord, load: InstanceLoad, now: float
    ) -> None:
        elapsed_s = now - record.last_report_s
        costs.reported(record.spec, record.load, elapsed_s, load, now)
        record.costs = costs.latest
        self._show(costs.latest)

    def _show(self, costs: LearnedCosts) -> None:
        self._shown = costs
        _write(self.snapshot, "step_time", costs.step_time)
        _write(self.snapshot, "mean_output_tokens", costs.mean_output_tokens)

    def show_costs(self) -> None:
        """Show what is known of costs by now: a checkpoint was restored."""
        if self._costs is not None:
            self._show(self._costs.latest)

    def request_ended(self) -> None:
        """A request has ended, wherever it was."""
        if self._costs is not None:
            self._costs.ended()

    def restore(
        self,
        record: InstanceRecord,
        load: InstanceLoad,
        last_report_s: float,
        is_fresh: bool,
        costs: LearnedCosts,
    ) -> None:
        """Put an instance back as a checkpoint has it."""
        record.costs = costs
        self._take_in(record, load, last_report_s)
        record.is_fresh = is_fresh
        self._next_stale_s = -math.inf
        self._publish_state(record)

    def set_state(self, record: InstanceRecord, state: InstanceState) -> None:
        """Move an instance forward in its life."""
        record.state = state
        self._publish_state(record)
        self._publish(record)

    def set_num_booting(self, num_booting: int) -> None:
        """Instances asked for that have not joined."""
        self.num_booting = num_booting
        _write(self.snapshot, "num_booting", num_booting)

    # Work sent but not reported.

    def add_sent(
        self, record: InstanceRecord, *, num_blocks: int, num_tokens: int, priority: int
    ) -> None:
        """Overlay one request (or one expected migration)."""
        record.num_sent += 1
        record.num_sent_blocks += num_blocks
        record.num_sent_tokens += num_tokens
        record.num_sent_high += priority >= _HIGH
        self._publish_usage(record, self._rows[record.spec.instance_id])

    def remove_sent(
        self, record: InstanceRecord, *, num_blocks: int, num_tokens: int, priority: int
    ) -> None:
        """Take an overlay away again: the report shows it now, or it ended."""
        record.discount_sent(num_blocks, num_tokens, priority)
        self.publish_sent(record)

    def publish_sent(self, record: InstanceRecord) -> None:
        """Show what the record says of work sent and not reported."""
        self._publish_usage(record, self._rows[record.spec.instance_id])

    def add_predicted(self, record: InstanceRecord, num_blocks: int) -> None:
        """Count (or with a negative number, discount) the expected final size of a request."""
        record.predicted_final_blocks += num_blocks
        row = self._rows[record.spec.instance_id]
        self._cells.predicted_final_blocks[row] = record.predicted_final_blocks

    def add_migration_out(self, source: InstanceRecord, by: int) -> None:
        """Count a migration that starts to leave (`by=1`) or ended (`by=-1`)."""
        source.num_migrations_out += by
        row = self._rows[source.spec.instance_id]
        self._columns.num_migrations_out[row] = source.num_migrations_out

    def add_migration_in(self, destination: InstanceRecord, by: int) -> None:
        """Count a migration that starts to come in (`by=1`) or ended (`by=-1`)."""
        destination.num_migrations_in += by
        row = self._rows[destination.spec.instance_id]
        self._columns.num_migrations_in[row] = destination.num_migrations_in

    # Rows.

    def _publish_state(self, record: InstanceRecord) -> None:
        row = self._rows[record.spec.instance_id]
        cells = self._cells
        accepting = record.state is _SERVING and record.is_fresh
        self._num_accepting += accepting - cells.is_accepting[row]
        cells.is_accepting[row] = accepting
        cells.is_draining[row] = record.state is InstanceState.DRAINING
        cells.is_fresh[row] = record.is_fresh
        cells.state[row] = _STATE_CODE[record.state]
        _write(self.snapshot, "num_accepting", self._num_accepting)
        self.snapshot.stable_values.clear()

    def _publish(self, record: InstanceRecord) -> None:
        load = record.load
        row = self._rows[record.spec.instance_id]
        cells = self._cells
        num_high = 0
        for priority, num_running in load.num_running_by_class:
            if priority >= _HIGH:
                num_high += num_running
        record.num_high_running = num_high
        cells.step_time_s[row] = load.step_time_s
        cells.last_report_s[row] = record.last_report_s
        cells.num_total_blocks[row] = load.num_total_blocks
        cells.num_running[row] = load.num_running
        cells.num_waiting[row] = load.num_waiting
        cells.head_of_line_blocks[row] = load.head_of_line_blocks
        cells.num_waiting_blocks[row] = load.num_waiting_blocks
        cells.num_high_running[row] = num_high
        cells.victim_blocks[row] = (
            load.victim_blocks
            if load.victim_blocks is not None
            else load.num_used_blocks // max(1, load.num_running)
        )
        self._publish_usage(record, row)

    def _publish_usage(self, record: InstanceRecord, row: int) -> None:
        # Algorithm 1 on plain numbers (see `core.load`): this runs at every dispatch and report.
        load = record.load
        cells = self._cells
        num_sent = record.num_sent
        num_total = load.num_total_blocks
        num_free = load.num_free_blocks - record.num_sent_blocks
        num_used = num_total - num_free
        num_waiting = load.num_waiting
        # What is arriving holds blocks already, so it counts as running.
        batch_size = load.num_running + load.num_migrations_in + num_sent
        cells.num_free_blocks[row] = num_free
        cells.num_used_blocks[row] = num_used
        cells.num_room_blocks[row] = num_free - load.num_waiting_blocks
        cells.num_unreported[row] = num_sent
        cells.batch_size[row] = batch_size
        cells.num_requests[row] = batch_size + num_waiting
        cells.num_prefill_tokens_pending[row] = (
            load.num_prefill_tokens_pending + record.num_sent_tokens
        )
        if record.is_priced:
            record.is_priced = False
            self._unpriced.append(record)
        if record.state is not _SERVING:
            cells.virtual_usage[row] = math.inf
            cells.freeness[row] = -math.inf
            return
        usage: float = num_used
        if num_waiting:
            usage += load.head_of_line_blocks
        if record.num_sent_high or record.num_high_running:
            usage += self._headroom.blocks(_HIGH, num_total)
        cells.virtual_usage[row] = usage
        if batch_size:
            cells.freeness[row] = (num_total - usage) / batch_size
        elif num_waiting or usage:
            cells.freeness[row] = num_total - usage
        else:
            cells.freeness[row] = math.inf

    # Costs: written once a policy reads them.

    def _first_read(self) -> None:
        self._keeps_costs = True
        self._price()
        _write(self.snapshot, "columns", self._columns.read_only(len(self._ids)))

    def _price(self) -> None:
        """Bring the cells of `COSTS` up to date."""
        rows, cells = self._rows, self._cells
        for record in self._unpriced:
            record.is_priced = True
            if record.state is not _GONE:
                self._publish_costs(record, rows[record.spec.instance_id], cells)
        self._unpriced.clear()

    def _publish_costs(self, record: InstanceRecord, row: int, cells: Columns) -> None:
        load, spec = record.load, record.spec
        step_time = record.costs.step_time
        num_free = load.num_free_blocks - record.num_sent_blocks
        num_used = load.num_total_blocks - num_free
        batch_size = load.num_running + load.num_migrations_in + record.num_sent
        if load.step_time_s > 0:
            step_s = load.step_time_s + step_time.running_s * record.num_sent
        else:
            step_s = step_time.base_s + step_time.running_s * batch_size
        token_s = step_time.prefill_token_s + step_s / spec.max_num_batched_tokens
        cells.decode_step_s[row] = step_s
        cells.prefill_token_s[row] = token_s
        cells.block_turnover_s[row] = step_s / (num_used or 1)
        # Work goes on between reports: it is the end of it that stays what it is.
        cells.prefill_ends_s[row] = (
            record.last_report_s
            + (load.num_prefill_tokens_pending + record.num_sent_tokens) * token_s
            + load.num_prefill_pairs_pending * step_time.prefill_pair_s
        )
        # The slope of the risk of an eviction, times what an eviction costs.
        num_requests = batch_size + load.num_waiting
        growth_tokens = self._reaction_s / (step_s or 1e-3)
        num_room = num_free - load.num_waiting_blocks
        if not num_requests:
            cells.num_spare_blocks[row] = math.inf
            num_requests = 1
        else:
            growth_blocks = num_requests * growth_tokens / spec.block_size
            cells.num_spare_blocks[row] = num_room - growth_blocks
        tokens_a_request = spec.block_size / num_requests
        exponent = min(MAX_RISK_EXPONENT, -num_room * tokens_a_request / growth_tokens)
        if exponent < -30:
            cells.block_price_s[row] = 0.0
            return
        # Evicted, a request waits for about one of the others to end, and is computed again.
        wait_s = record.costs.mean_output_tokens * step_s / num_requests
        again_s = num_used * tokens_a_request * token_s
        slope = spec.block_size / growth_tokens * math.exp(exponent)
        cells.block_price_s[row] = (wait_s + again_s) * slope
