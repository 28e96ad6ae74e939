"""From live requests to columns: what is kept of each request, and the result made of all.

Invariant: a row is written once, when its request ends or the simulation does; until then it says
UNFINISHED. This module does not know how anything came about.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence

import numpy as np

from llumsched.core.load import InstanceLoad
from llumsched.core.types import SchedulingRequest
from llumsched.policy_failures import PolicyFailures
from llumsched.simulator.cluster.instances import Instances
from llumsched.simulator.cluster.migration_record import Move
from llumsched.simulator.cluster.migration_source import Migrations
from llumsched.simulator.engines.request import DECODING, LiveRequest
from llumsched.simulator.kernel import PS_PER_S, Kernel, to_s
from llumsched.simulator.options import SimulationError, SimulationOptions
from llumsched.simulator.results.records import (
    FloatArray,
    IntArray,
    MigrationRecord,
    RequestStatus,
    Timeline,
    TokenGaps,
)
from llumsched.simulator.results.result import SimulationResult
from llumsched.simulator.traces.trace import Trace

NAN = math.nan
FINISHED = int(RequestStatus.FINISHED)


class Columns:
    """The rows of a trace as they go in and come out."""

    def __init__(self, trace: Trace, kernel: Kernel) -> None:
        self._trace = trace
        self._kernel = kernel
        self._client_ids = trace.client_ids
        self._predicted = trace.predicted_output_tokens
        n = len(trace)
        self.arrivals = _picoseconds(trace.arrival_s)
        # Arrays rather than lists: eight bytes a value, for a million requests.
        self._prompts = array("q", trace.num_prompt_tokens.astype(np.int64).tobytes())
        self._outputs = array("q", trace.num_output_tokens.astype(np.int64).tobytes())
        self._scheduling = array("q", trace.scheduling_priority.astype(np.int64).tobytes())
        self._execution = array("q", trace.execution_priority.astype(np.int64).tobytes())
        nan = array("d", [NAN]) * n
        zero = array("q", [0]) * n
        self.dispatched = nan[:]
        self.scheduled = nan[:]
        self.first_token = nan[:]
        self.finished = nan[:]
        self.itl_max = nan[:]
        self.loss = array("d", [0.0]) * n
        self.downtime = array("d", [0.0]) * n
        self.generated = zero[:]
        self.num_preemptions = zero[:]
        self.num_cached = zero[:]
        self.num_migrations = zero[:]
        self.instance = array("q", [-1]) * n
        self.status = zero[:]
        self.num_cut_short = 0
        self.rejections: dict[int, str] = {}
        self.last_end = 0

    def live_request(self, row: int, now: int, instances: Instances) -> LiveRequest:
        """The request of a row, as it arrives. Output beyond the longest model length is cut."""
        num_prompt = self._prompts[row]
        num_output = self._outputs[row]
        if num_prompt + num_output > instances.max_model_len > num_prompt:
            num_output = instances.max_model_len - num_prompt
            self.num_cut_short += 1
        hashes: Sequence[int] = ()
        if instances.has_caches:
            hashes = self._block_hashes(row, instances.block_size)
        return LiveRequest(
            row, f"r{row}", num_prompt, num_output, self._execution[row], now, hashes
        )

    def _block_hashes(self, row: int, block_size: int) -> tuple[int, ...]:
        """The trace's hashes, as one for each full KV block of the prompt."""
        trace = self._trace
        assert trace.prefix_hashes is not None
        hashes = trace.prefix_hashes[row]
        size = trace.hash_block_size
        if size == block_size:
            return hashes
        if size < block_size:
            # A block is known by the last hash that lies within it whole.
            num_blocks = len(hashes) * size // block_size
            return tuple(hashes[(i + 1) * block_size // size - 1] for i in range(num_blocks))
        num_blocks = len(hashes) * size // block_size
        return tuple(
            hash((hashes[((i + 1) * block_size - 1) // size], i)) for i in range(num_blocks)
        )

    def scheduling_request(
        self, row: int, request: LiveRequest, tells_blocks: bool
    ) -> SchedulingRequest:
        """A trace's request as the scheduler sees it."""
        predicted, client_ids = self._predicted, self._client_ids
        return SchedulingRequest(
            request_id=request.request_id,
            num_prompt_tokens=request.num_prompt,
            scheduling_priority=self._scheduling[row],
            execution_priority=request.execution_priority,
            arrival_s=request.arrival / PS_PER_S,
            client_id=None if client_ids is None else client_ids[row],
            prefix_hashes=tuple(request.hashes) if tells_blocks else (),
            predicted_output_tokens=None if predicted is None else int(predicted[row]),
        )

    def write_finished(self, request: LiveRequest, now: int) -> None:
        """The last token came."""
        row = request.row
        self.last_end = real = now + self._kernel.skipped
        self.finished[row] = real / PS_PER_S
        self._write(request, FINISHED)

    def write_rejected(self, request: LiveRequest, reason: str) -> None:
        """Record that a request was answered with an error."""
        self.rejections[request.row] = reason
        self._write(request, int(RequestStatus.REJECTED))

    def write_unfinished(self, request: LiveRequest, now: int, *, is_known: bool) -> None:
        """The simulation ended first; `is_known`: the scheduler has it on some instance."""
        if request.phase == DECODING:
            steps_left = request.finish_step - request.place.progress_at(now)
            request.generated = request.num_output - steps_left
        is_lost = request.place is None and not is_known and request.dispatched >= 0
        self._write(request, int(RequestStatus.LOST if is_lost else RequestStatus.UNFINISHED))

    def _write(self, request: LiveRequest, status: int) -> None:
        row = request.row
        self.status[row] = status
        self.generated[row] = request.generated
        # No idle time is cut out while a request is live.
        skipped = self._kernel.skipped
        if request.dispatched >= 0:
            self.dispatched[row] = (request.dispatched + skipped) / PS_PER_S
        if request.scheduled >= 0:
            self.scheduled[row] = (request.scheduled + skipped) / PS_PER_S
        if request.first_token >= 0:
            self.first_token[row] = (request.first_token + skipped) / PS_PER_S
        if request.generated > 1:
            self.itl_max[row] = request.itl_max / PS_PER_S
        if request.place is not None:
            self.instance[row] = request.place.index
        if request.num_cached:
            self.num_cached[row] = request.num_cached
        if request.num_preemptions:
            self.num_preemptions[row] = request.num_preemptions
        if request.loss:
            self.loss[row] = request.loss / PS_PER_S
        if request.num_migrations:
            self.num_migrations[row] = request.num_migrations
            self.downtime[row] = request.downtime / PS_PER_S


def _picoseconds(seconds: FloatArray) -> Sequence[int]:
    """Whole picoseconds; as plain integers where they are more than 64 bits hold (106 days)."""
    rounded = np.rint(seconds * PS_PER_S)
    if len(rounded) and np.abs(rounded).max() >= 2.0**62:
        return [int(value) for value in rounded.tolist()]
    return array("q", rounded.astype(np.int64).tobytes())


class TimelineRecorder:
    """Collects a sample at every load report."""

    def __init__(self) -> None:
        self._time = array("d")
        self._rows = array("q")

    def add(self, now: int, index: int, load: InstanceLoad) -> None:
        """One sample."""
        self._time.append(now / PS_PER_S)
        self._rows.extend(
            (
                index,
                load.num_used_blocks - load.num_reserved_blocks,
                load.num_reserved_blocks,
                load.num_free_blocks,
                load.num_running,
                load.num_waiting,
            )
        )

    def timeline(self) -> Timeline:
        """All samples."""
        rows = np.frombuffer(self._rows, dtype=np.int64).reshape(-1, 6).copy()
        return Timeline(
            time_s=_floats(self._time),
            instance=rows[:, 0],
            num_used_blocks=rows[:, 1],
            num_reserved_blocks=rows[:, 2],
            num_free_blocks=rows[:, 3],
            num_running=rows[:, 4],
            num_waiting=rows[:, 5],
        )


def _floats(values: array[float]) -> FloatArray:
    return np.frombuffer(values, dtype=np.float64).copy() if values else np.empty(0)


def _ints(values: array[int]) -> IntArray:
    return np.frombuffer(values, dtype=np.int64).copy() if values else np.empty(0, dtype=np.int64)


def result_of(
    *,
    trace: Trace,
    options: SimulationOptions,
    policy: str,
    columns: Columns,
    instances: Instances,
    migrations: Migrations,
    timeline: TimelineRecorder | None,
    failures: PolicyFailures,
    counters: Mapping[str, int],
    now: int,
    uses_randomness: bool,
    is_complete: bool,
) -> SimulationResult:
    """Everything that is known at the end."""
    first_arrival = columns.arrivals[0] if len(trace) else 0
    result = SimulationResult(
        trace=trace,
        options=options,
        policy=policy,
        dispatched_s=_floats(columns.dispatched),
        scheduled_s=_floats(columns.scheduled),
        first_token_s=_floats(columns.first_token),
        finished_s=_floats(columns.finished),
        num_output_tokens=_ints(columns.generated),
        token_gaps=_token_gaps(instances),
        itl_max_s=_floats(columns.itl_max),
        num_cached_tokens=_ints(columns.num_cached),
        num_preemptions=_ints(columns.num_preemptions),
        preemption_loss_s=_floats(columns.loss),
        num_migrations=_ints(columns.num_migrations),
        migration_downtime_s=_floats(columns.downtime),
        instance=_ints(columns.instance),
        status=_ints(columns.status),
        instances=instances.lifetimes(),
        migrations=tuple(_record(move) for move in migrations.moves),
        timeline=None if timeline is None else timeline.timeline(),
        makespan_s=to_s(max(0, columns.last_end - first_arrival)),
        end_s=to_s(now),
        num_steps=sum(engine.num_steps for engine in instances.engines),
        counters=dict(sorted(counters.items())),
        rejections=columns.rejections,
        policy_failures=tuple(failures),
        warnings=tuple(_warnings(options, columns, instances)),
        uses_randomness=uses_randomness,
        is_complete=is_complete,
    )
    check_times(result, columns.arrivals)
    return result


def check_times(result: SimulationResult, arrivals: Sequence[int]) -> None:
    """Refuse a history that cannot be, before anybody sees a figure of it.

    Raises:
        SimulationError: something of a request came before what it follows from, or took less than
            no time. It is a fault of the simulator.
    """
    before = np.array([arrival / PS_PER_S for arrival in arrivals])
    for name in ("dispatched_s", "scheduled_s", "first_token_s", "finished_s"):
        after = getattr(result, name)
        if (after < before).any():
            row = int(np.argmax(after < before))
            raise SimulationError(
                f"a fault of the simulator: {name} of request {row} is {after[row]:.6f} s, before"
                f" what it follows from ({before[row]:.6f} s); please report it"
            )
        before = np.where(np.isnan(after), before, after)
    for name in ("itl_max_s", "preemption_loss_s", "migration_downtime_s"):
        if (getattr(result, name) < 0).any():
            raise SimulationError(f"a fault of the simulator: a negative {name}; please report it")


def _token_gaps(instances: Instances) -> TokenGaps:
    runs = np.concatenate([_ints(engine.gap_runs) for engine in instances.engines]).reshape(-1, 4)
    return TokenGaps(
        first_s=runs[:, 0] / PS_PER_S,
        growth_s=runs[:, 1] / PS_PER_S,
        num_steps=runs[:, 2].copy(),
        num_tokens=runs[:, 3].copy(),
    )


def _record(move: Move) -> MigrationRecord:
    return MigrationRecord(
        migration_id=move.migration_id,
        request=move.request.row,
        source=move.order.source,
        destination=move.order.destination,
        start_s=to_s(move.start + move.skipped),
        end_s=to_s(move.end + move.skipped) if move.end >= 0 else NAN,
        num_stages=move.migration.stage,
        num_blocks=move.num_blocks_copied,
        downtime_s=to_s(move.downtime) if move.downtime >= 0 else NAN,
        outcome=move.outcome or "under way",
    )


def _warnings(options: SimulationOptions, columns: Columns, instances: Instances) -> list[str]:
    """Warnings that a reader of the numbers must know."""
    found = []
    hardware = options.hardware
    measured = hardware.measured
    if math.isnan(hardware.fit_error):
        found.append(f"NOT MEASURED: {hardware.name}: {' '.join(hardware.notes[:1])}")
    if not hardware.step.host_s:
        found.append(
            f"NO HOST TIME: {hardware.name} has kernel times alone (host_s: 0): where nothing"
            " queues, TTFT comes out about half of a server's"
        )
    for what, most, limit in (
        ("tokens in a step", max(e.most_tokens for e in instances.engines), measured.batch_tokens),
        ("requests in a step", max(e.most_requests for e in instances.engines), measured.requests),
        (
            "tokens of context in a step",
            max(e.most_kv_tokens for e in instances.engines),
            measured.kv_tokens,
        ),
    ):
        if most > limit:
            found.append(
                f"EXTRAPOLATED: up to {most:,} {what}; {hardware.name} was measured up to {limit:,}"
            )
    if columns.num_cut_short:
        found.append(
            f"{columns.num_cut_short:,} outputs were cut short: prompt and output together exceed "
            f"{instances.max_model_len:,} tokens, the most that an instance can hold and recompute"
        )
    return found
