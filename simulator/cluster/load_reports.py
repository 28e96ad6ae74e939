"""Load reports of the simulated instances: when they are made, what they say, when they arrive.

As from a llumlet: one each interval, and one more after a large change, no closer than a shortest
interval after the last; the size of the request that would move next is looked up more rarely,
since that takes a look at all that run. Reports arrive in the order in which they were made, all
after the same delay.

Invariant: a report says what the instance knows, and no output length. This module does not know
what becomes of a report.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from llumsched.core.events import Event, KvBlocksRemoved, KvBlocksStored, LoadReported
from llumsched.core.load import InstanceLoad
from llumsched.simulator.cluster.migration_source import Migrations
from llumsched.simulator.cluster.results import TimelineRecorder
from llumsched.simulator.engines.base import Engine
from llumsched.simulator.kernel import PS_PER_S, Kernel, to_ps
from llumsched.simulator.options import SimulationOptions

# As `runtime.llumlet` and `engine.vllm.load` have them, which import what no simulation needs.
LARGE_CHANGE_OF_BLOCKS = 0.1
SHORTEST_INTERVAL = to_ps(0.02)
VICTIM_INTERVAL = to_ps(0.5)


class Reports:
    """Two queues in the order of time: of reports to make, and of events on their way."""

    def __init__(
        self,
        options: SimulationOptions,
        *,
        kernel: Kernel,
        migrations: Migrations,
        timeline: TimelineRecorder | None,
        tells_blocks: bool,
        tells_victim: bool,
        tells_progress: bool,
    ) -> None:
        self._interval = to_ps(options.report_interval_s)
        self._shortest_interval = min(SHORTEST_INTERVAL, self._interval)
        self._delay = to_ps(options.report_delay_s)
        self._kernel = kernel
        self._migrations = migrations
        self._timeline = timeline
        self._tells_blocks = tells_blocks
        self._tells_victim = tells_victim
        self._tells_progress = tells_progress
        self.due: deque[tuple[int, Engine]] = deque()
        """When which instance reports; an entry that is not the engine's `report_due` is void."""
        self.arriving: deque[tuple[int, Event]] = deque()

    def begin(self, engine: Engine, now: int, first: int) -> None:
        """An instance is up; its first report is made `first` from now on."""
        engine.last_report = now
        self._plan(engine, now + first)

    def first_after(self, index: int, num_instances: int) -> int:
        """The first report of one of many that start together: spread over the interval, as those
        of independent processes are."""
        return (index + 1) * self._interval // num_instances

    def begin_later(self, engine: Engine, now: int) -> None:
        """An instance came up by itself."""
        self.begin(engine, now, self._interval)

    def changed(self, engine: Engine, num_free_blocks: int, now: int) -> None:
        """The load has changed at the end of a step; after much of it a report follows as soon as
        one may: a queue that has come or gone, or a large share of the blocks."""
        if (
            engine.reported_waiting == bool(engine.waiting)
            and abs(num_free_blocks - engine.reported_free_blocks)
            <= LARGE_CHANGE_OF_BLOCKS * engine.num_blocks
        ):
            return
        at = max(now + 1, engine.last_report + self._shortest_interval)
        if at < engine.report_due:
            # Reports of other instances are due in between: it cannot wait in their queue.
            engine.report_due = at
            self._kernel.send(at, lambda at: self.make(engine, at))

    def make(self, engine: Engine, now: int) -> None:
        """The report that is due, if it is."""
        if engine.report_due != now or not engine.is_alive:
            return
        engine.last_report = now
        self._plan(engine, now + self._interval)
        if self._tells_victim and now >= engine.next_victim:
            engine.next_victim = now + VICTIM_INTERVAL
            engine.victim_blocks = self._migrations.victim_blocks(engine, now)
        num_in, num_out = self._migrations.counts(engine.index)
        load = read_load(
            engine,
            now,
            num_in,
            num_out,
            tells_progress=self._tells_progress,
        )
        if self._timeline is not None:
            self._timeline.add(now + self._kernel.skipped, engine.index, load)
        at = now + self._delay
        if self._tells_blocks:
            for event in kv_events(engine, load.num_free_blocks):
                self.arriving.append((at, event))
        self.arriving.append((at, LoadReported(load=load)))

    def _plan(self, engine: Engine, at: int) -> None:
        engine.report_due = at
        self.due.append((at, engine))


def read_load(
    engine: Engine,
    now: int,
    num_migrations_in: int,
    num_migrations_out: int,
    *,
    tells_progress: bool = False,
) -> InstanceLoad:
    """The report; what came and ended since the last one is told in it, once. A step is measured
    for a scheduler that learns from it, and progress told to one that follows requests."""
    engine.num_reports += 1
    num_free_blocks, step_ps = engine.free_and_step_time_at(now)
    num_running = len(engine.running)
    num_high = engine.num_high_running
    waiting = engine.waiting
    prefill_tokens, prefill_pairs = engine.num_waiting_tokens, engine.num_waiting_pairs
    for request, _ in engine.prefills:
        target, computed = request.target, request.computed
        prefill_tokens += target - computed
        prefill_pairs += (target * target - computed * computed) // 2
    engine.reported_free_blocks = num_free_blocks
    engine.reported_waiting = bool(waiting)
    received, finished = engine.received_ids, engine.finished_ids
    if received:
        engine.received_ids = []
    if finished:
        engine.finished_ids = []
    return InstanceLoad(
        instance_id=engine.instance_id,
        sequence=engine.num_reports,
        num_total_blocks=engine.num_blocks,
        num_free_blocks=num_free_blocks,
        num_reserved_blocks=engine.num_reserved,
        num_running=num_running,
        num_waiting=len(waiting) + len(engine.holding),
        head_of_line_blocks=-(-waiting[0].target // engine.block_size) if waiting else 0,
        num_waiting_blocks=engine.num_waiting_blocks,
        num_waiting_tokens=engine.num_waiting_tokens,
        num_prefill_tokens_pending=prefill_tokens,
        num_prefill_pairs_pending=prefill_pairs,
        step_time_s=step_ps / PS_PER_S,
        step=engine.take_step(now) if engine.measures_steps else None,
        num_running_by_class=(
            ((0, num_running - num_high), (1, num_high)) if num_high else ((0, num_running),)
        ),
        victim_blocks=engine.victim_blocks,
        num_migrations_in=num_migrations_in,
        num_migrations_out=num_migrations_out,
        num_decode_steps=engine.progress_at(now) if tells_progress else 0,
        progress=tuple(engine.take_progress(now)) if tells_progress else (),
        received_request_ids=tuple(received),
        finished_request_ids=tuple(finished),
    )


def kv_events(engine: Engine, num_free_blocks: int) -> Iterator[KvBlocksRemoved | KvBlocksStored]:
    """Changes of the engine's prefix cache since the last report."""
    assert engine.cache is not None
    engine.cache.shrink(num_free_blocks)
    stored, removed = engine.cache.changes()
    if removed:
        yield KvBlocksRemoved(instance_id=engine.instance_id, block_hashes=removed)
    if stored:
        yield KvBlocksStored(instance_id=engine.instance_id, block_hashes=stored)
