"""The simulated cluster: the host that carries out what the global scheduler decides.

Four streams are merged by time: arrivals and load reports, which are in order by themselves, the
scheduler's own deadline, and the kernel's heap for all else. At one instant arrivals come first,
then deadlines, reports, messages, and last the ends of engine steps (see `kernel`).

Invariants: the scheduler is told only what a real host could tell it: arrivals and ends of requests
by the frontend, load and cached blocks by reports as old as configured, never a length of output.
What it decides at the end of a step takes effect an instant later. This module does not know how an
engine fills a batch (`engines.base`), how a migration proceeds (`migration_source`), or what the
numbers are worth (`metrics`).
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop

from llumsched.core.actions import (
    Action,
    DispatchRequest,
    LaunchInstance,
    PolicyFailed,
    RefuseMigration,
    RejectRequest,
    StartMigration,
    TerminateInstance,
)
from llumsched.core.events import (
    Event,
    InstanceJoined,
    InstanceLost,
    MigrationFinished,
    MigrationOutcome,
    RequestArrived,
    RequestFinished,
)
from llumsched.core.load import InstanceSpec
from llumsched.core.types import InstanceRole
from llumsched.policy_failures import PolicyFailures
from llumsched.simulator.cluster.idle import IdleTime
from llumsched.simulator.cluster.instances import Instances
from llumsched.simulator.cluster.load_reports import VICTIM_INTERVAL, Reports
from llumsched.simulator.cluster.migration_source import Migrations
from llumsched.simulator.cluster.results import Columns, TimelineRecorder, result_of
from llumsched.simulator.cluster.scheduler_port import SchedulerPort
from llumsched.simulator.engines.base import Engine
from llumsched.simulator.engines.cost import copy_ps
from llumsched.simulator.engines.request import AWAY, LiveRequest
from llumsched.simulator.kernel import NEVER, PS_PER_S, STEP, Kernel, to_ps
from llumsched.simulator.options import SimulationOptions
from llumsched.simulator.results.result import SimulationResult
from llumsched.simulator.traces.trace import Trace

# How many turns of the loop pass between two looks at progress and stop.
TURNS_BETWEEN_LOOKS = 8192
# What comes by itself, in the order of one instant.
_ARRIVAL, _DEADLINE, _REPORTED, _REPORT = range(4)


class Cluster:
    """One simulation; `run` it once."""

    def __init__(self, trace: Trace, options: SimulationOptions) -> None:
        self._trace = trace
        self._options = options
        self._port = port = SchedulerPort(options)
        self._kernel = Kernel()
        self._columns = Columns(trace, self._kernel)
        self._instances = Instances(
            options,
            self._kernel,
            self,
            has_hashes=trace.prefix_hashes is not None,
            measures_steps=port.scheduler.options.learn_costs or options.decision_log is not None,
        )
        self._tells_blocks = (
            port.scheduler.options.prefix_index_blocks > 0 and self._instances.has_caches
        )
        hardware = options.hardware
        block_size = hardware.kv.block_size
        self._migrations = Migrations(
            kernel=self._kernel,
            host=self,
            victim=port.bundle.victim,
            options=port.migration_options,
            message_delay=to_ps(options.message_delay_s),
            copy=lambda num_blocks: copy_ps(hardware.copy, num_blocks * block_size),
            predicts_lengths=(
                port.bundle.predictor is not None or trace.predicted_output_tokens is not None
            ),
        )
        self._live: dict[str, LiveRequest] = {}
        self._num_ended = 0
        self._held: set[str] = set()
        self._counters: Counter[str] = Counter()
        self._failures = PolicyFailures()
        self._timeline = TimelineRecorder() if options.record_timeline else None
        self._idle = IdleTime(options, port.scheduler.options, victim_interval=VICTIM_INTERVAL)
        self._reports = Reports(
            options,
            kernel=self._kernel,
            migrations=self._migrations,
            timeline=self._timeline,
            tells_blocks=self._tells_blocks,
            tells_victim=port.bundle.migration is not None,
            tells_progress=port.scheduler.options.follow_requests,
        )

    @property
    def engines(self) -> Sequence[Engine]:
        """The engine models of all instances there have been."""
        return self._instances.engines

    # ---- the loop -------------------------------------------------------------------------

    def run(
        self,
        progress: Callable[[int, float], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> SimulationResult:
        """Until every request has ended, `until_s` comes, or `stop` says so."""
        # Nearly all that is made is dropped at once and in no cycle: looking for cycles among it
        # costs a tenth of the time and finds nothing.
        was_collecting = gc.isenabled()
        gc.disable()
        try:
            self._start()
            is_complete = self._loop(progress, stop)
        finally:
            if was_collecting:
                gc.enable()
            self._port.close()
        for request in self._live.values():
            known = self._port.scheduler.request_instance(request.request_id)
            self._columns.write_unfinished(request, self._kernel.now, is_known=known is not None)
        return result_of(
            trace=self._trace,
            options=self._options,
            policy=self._port.bundle.name,
            columns=self._columns,
            instances=self._instances,
            migrations=self._migrations,
            timeline=self._timeline,
            failures=self._failures,
            counters=self._counters,
            uses_randomness=self._port.has_drawn,
            now=self._kernel.now + self._kernel.skipped,
            is_complete=is_complete,
        )

    def _start(self) -> None:
        options = self._options
        for index in range(options.num_instances):
            engine = self._instances.launch(0)
            self._join(engine, None, InstanceRole.MIXED, 0)
            first = self._reports.first_after(index, options.num_instances)
            self._reports.begin(engine, 0, first)
        for index, time_s in options.failures:
            engine = self._instances.engines[index]
            self._kernel.send(to_ps(time_s), lambda at, engine=engine: self._fail(engine, at))

    def _loop(
        self, progress: Callable[[int, float], None] | None, stop: Callable[[], bool] | None
    ) -> bool:
        kernel, port = self._kernel, self._port
        heap = kernel.heap
        arrivals = self._columns.arrivals
        num_requests = len(arrivals)
        reports, arriving = self._reports.due, self._reports.arriving
        until = NEVER if self._options.until_s is None else to_ps(self._options.until_s)
        next_row = 0
        next_arrival = arrivals[0] if num_requests else NEVER
        turns = TURNS_BETWEEN_LOOKS
        while self._num_ended < num_requests:
            turns -= 1
            if not turns:
                turns = TURNS_BETWEEN_LOOKS
                if progress is not None:
                    progress(self._num_ended, (kernel.now + kernel.skipped) / PS_PER_S)
                if stop is not None and stop():
                    return False
            # The next of what comes by itself.
            now, source = next_arrival, _ARRIVAL
            if port.wake_at < now:
                now, source = port.wake_at, _DEADLINE
            if arriving and arriving[0][0] < now:
                now, source = arriving[0][0], _REPORTED
            if reports and reports[0][0] < now:
                now, source = reports[0][0], _REPORT
            if heap and heap[0][0] < now:
                if heap[0][0] <= until:
                    self._work_off_heap(now if now <= until else until + 1, num_requests)
                    continue
                now = heap[0][0]
            if now > until or now == NEVER:
                kernel.now = min(now, until) if now != NEVER else kernel.now
                return False
            kernel.now = now
            if source == _ARRIVAL:
                self._arrive(next_row, now)
                next_row += 1
                next_arrival = NEVER
                if next_row < num_requests:
                    next_arrival = arrivals[next_row] - kernel.skipped
            elif source == _REPORT:
                if not (self._live or heap):
                    length = self._idle.length(now, min(next_arrival, until))
                    kernel.skipped += length
                    next_arrival -= length
                    until -= length
                _, engine = reports.popleft()
                self._reports.make(engine, now)
            elif source == _REPORTED:
                event = arriving.popleft()[1]
                actions = port.handle(event, now)
                # A report moves a deadline only by what it leads to, or of what is held.
                if actions or self._held:
                    self._carry_out_all(actions, now)
            else:
                for action in port.wake(now):
                    self._carry_out(action, now)
        return True

    def _work_off_heap(self, before: int, num_requests: int) -> None:
        """Ends of steps before this time, and the first message, after which it may be another."""
        kernel = self._kernel
        heap = kernel.heap
        while heap and heap[0][0] < before:
            now, priority, _, item = heappop(heap)
            kernel.now = self._idle.busy_at = now
            if priority != STEP:
                item(now)
                return
            # A segment that was cut has an entry left where it would have ended.
            if item.due == now:
                item.end_of_segment(now)
                if self._num_ended == num_requests:
                    return

    # ---- the scheduler --------------------------------------------------------------------

    def _tell(self, event: Event, now: int) -> None:
        """Tell the scheduler, and do what it says."""
        self._carry_out_all(self._port.handle(event, now), now)

    def _carry_out_all(self, actions: Iterable[Action], now: int) -> None:
        for action in actions:
            self._carry_out(action, now)
        self._port.replan(now)

    def _carry_out(self, action: Action, now: int) -> None:
        self._counters[type(action).__name__] += 1
        match action:
            case DispatchRequest():
                self._dispatch(action, now)
            case RejectRequest():
                request = self._live.pop(action.request_id)
                self._columns.write_rejected(request, action.reason)
                self._held.discard(action.request_id)
                self._num_ended += 1
            case StartMigration():
                delay = to_ps(self._options.message_delay_s)
                self._kernel.send(now + delay, lambda at: self._start_migration(action, at))
            case LaunchInstance():
                self._launch(action, now)
            case TerminateInstance():
                engine = self._instances.by_id[action.instance_id]
                self._kernel.send(now + 1, lambda at: self._leave(engine, at))
            case PolicyFailed():
                self._failures.add(action)
            case RefuseMigration():
                pass

    # ---- requests -------------------------------------------------------------------------

    def _arrive(self, row: int, now: int) -> None:
        self._idle.busy_at = now
        columns = self._columns
        request = columns.live_request(row, now, self._instances)
        if request.num_prompt >= self._instances.max_model_len:
            # The frontend's answer: no engine takes it.
            self._counters["prompts too long"] += 1
            columns.write_rejected(request, self._instances.too_long)
            self._num_ended += 1
            return
        self._live[request.request_id] = request
        event = RequestArrived(request=columns.scheduling_request(row, request, self._tells_blocks))
        actions = self._port.handle(event, now)
        if len(actions) == 1 and not self._held:
            action = actions[0]
            if type(action) is DispatchRequest:
                # The usual case: nothing is held, so no deadline has moved.
                self._counters["DispatchRequest"] += 1
                self._dispatch(action, now)
                return
        self._held.add(request.request_id)
        self._carry_out_all(actions, now)

    def _dispatch(self, action: DispatchRequest, now: int) -> None:
        self._held.discard(action.request_id)
        request = self._live.get(action.request_id)
        if request is None or request.phase != AWAY:
            # It ended, or runs on where it is, while the scheduler thought it lost.
            self._counters["dispatches without effect"] += 1
            return
        if request.dispatched < 0:
            request.dispatched = now
        request.predicted = action.predicted_output_tokens
        engine = self._instances.by_id[action.instance_id]
        if engine.is_alive:
            engine.add(request, now)

    def finished(self, engine: Engine, request: LiveRequest, now: int) -> None:
        """The last token has come; the frontend tells it."""
        if request.migration is not None:
            self._migrations.request_finished(request, now)
        del self._live[request.request_id]
        self._num_ended += 1
        self._columns.write_finished(request, now)
        event = RequestFinished(request_id=request.request_id, num_output_tokens=request.generated)
        actions = self._port.handle(event, now)
        if actions or self._held:
            # At the end of a step: what follows belongs to a later instant.
            self._kernel.send(now + 1, lambda at: self._carry_out_all(actions, at))

    def preempted(self, engine: Engine, request: LiveRequest, now: int) -> None:
        """The engine evicted it."""
        if request.migration is not None:
            self._migrations.request_preempted(request, now)

    def load_changed(self, engine: Engine, num_free_blocks: int, now: int) -> None:
        """Note a change of load, which may be worth a report of its own."""
        self._reports.changed(engine, num_free_blocks, now)

    def suspended(self, engine: Engine, request: LiveRequest, now: int) -> None:
        """Note that a request is out of the batch for its migration."""
        self._migrations.request_suspended(request, now)

    # ---- instances ------------------------------------------------------------------------

    def _join(self, engine: Engine, launch_id: str | None, role: InstanceRole, now: int) -> None:
        options = self._options
        spec = InstanceSpec(
            instance_id=engine.instance_id,
            num_total_blocks=engine.num_blocks,
            block_size=engine.block_size,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.effective_batched_tokens,
            role=role,
        )
        self._instances.serve(engine, now)
        self._tell(InstanceJoined(spec=spec, launch_id=launch_id), now)

    def _launch(self, action: LaunchInstance, now: int) -> None:
        engine = self._instances.launch(now)

        def up(at: int) -> None:
            self._join(engine, action.launch_id, action.role, at)
            self._reports.begin_later(engine, at)

        self._kernel.send(now + to_ps(self._options.effective_boot_s), up)

    def _fail(self, engine: Engine, now: int) -> None:
        """Let an instance die without a word; the scheduler learns of it later."""
        if not engine.is_alive:
            return
        self._instances.stop(engine, now)
        self._lose_requests(engine, now)
        delay = to_ps(self._options.failure_detection_s)
        self._kernel.send(now + delay, lambda at: self._lost(engine, "it died", at))

    def _leave(self, engine: Engine, now: int) -> None:
        """The scheduler let it go; what is still on it is dispatched again."""
        if engine.is_alive:
            self._instances.stop(engine, now)
            self._lose_requests(engine, now)
        self._lost(engine, "terminated", now)

    def _lose_requests(self, engine: Engine, now: int) -> None:
        engine.die(now)
        for request in self._live.values():
            if request.place is engine:
                request.place = None
                request.phase = AWAY
                request.killed = now
                request.held = ()

    def _lost(self, engine: Engine, reason: str, now: int) -> None:
        for event in self._migrations.instance_died(engine, now):
            # A commit is told before the loss of its source.
            self._tell(event, now)
        self._held.update(r.request_id for r in self._live.values() if r.phase == AWAY)
        self._tell(InstanceLost(instance_id=engine.instance_id, reason=reason), now)

    # ---- migrations -----------------------------------------------------------------------

    def _start_migration(self, action: StartMigration, now: int) -> None:
        source = self._instances.by_id[action.source]
        destination = self._instances.by_id[action.destination]
        if not source.is_alive or not destination.is_alive:
            return
        if action.has_ended:
            refused = MigrationFinished(
                migration_id=action.migration_id,
                request_id=action.request_id,
                source=action.source,
                destination=action.destination,
                outcome=MigrationOutcome.REFUSED,
                reason="no KV of ended requests moves here",
            )
            self.migration_ended(refused, now)
            return
        named = None if action.request_id is None else self._live.get(action.request_id)
        self._migrations.start(action, named, source, destination, now)

    def policy_failed(self, failed: PolicyFailed) -> None:
        """A source could not ask which request is to move."""
        self._counters["PolicyFailed"] += 1
        self._failures.add(failed)

    def migration_ended(self, event: MigrationFinished, now: int) -> None:
        """The source's report has come."""
        self._counters[f"migrations {event.outcome.value}"] += 1
        self._tell(event, now)
