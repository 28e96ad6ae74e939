"""A result as a Chrome trace (the JSON that Perfetto and chrome://tracing open).

An instance is a process: counters for its KV blocks and its requests, and a lane for each of the
requests that it serves at a time, with what the request did there: queued, prefill, decode.
Migrations are arrows from the source's lane to the destination's. Times are microseconds. A viewer
chokes on millions of slices, so requests beyond a limit are left out, which the file says.
"""

from __future__ import annotations

import heapq
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llumsched.simulator.results.metrics import COMMITTED
from llumsched.simulator.results.records import MigrationRecord, RequestStatus
from llumsched.simulator.results.result import SimulationResult

DEFAULT_MAX_REQUESTS = 20_000
_US = 1e6
# Lane 0 of an instance is for counters.
_FIRST_LANE = 1


@dataclass(frozen=True, slots=True)
class _Stay:
    """A request on one instance, for a time; `arrow` numbers the migration that ended it."""

    request: int
    instance: int
    start_s: float
    end_s: float
    arrow_in: str | None
    arrow_out: str | None


def write_chrome_trace(
    result: SimulationResult, path: Path, *, max_requests: int = DEFAULT_MAX_REQUESTS
) -> None:
    """Write the trace, an event a line."""
    num_shown = min(len(result.trace), max_requests)
    metadata = {
        "policy": result.policy,
        "trace": result.trace.name,
        "requests": f"{num_shown} of {len(result.trace)}",
    }
    with path.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms",\n')
        file.write(f'"otherData": {json.dumps(metadata)},\n"traceEvents": [\n')
        separator = ""
        for event in _events(result, num_shown):
            file.write(separator + json.dumps(event))
            separator = ",\n"
        file.write("\n]}\n")


def _events(result: SimulationResult, num_shown: int) -> Iterator[dict[str, Any]]:
    for index, life in enumerate(result.instances):
        yield {
            "ph": "M", "name": "process_name", "pid": index, "args": {"name": life.instance_id}
        }  # fmt: skip
        yield {
            "ph": "M", "name": "process_sort_index", "pid": index, "args": {"sort_index": index}
        }  # fmt: skip
    yield from _counters(result)
    yield from _requests(result, num_shown)


def _counters(result: SimulationResult) -> Iterator[dict[str, Any]]:
    timeline = result.timeline
    if timeline is None:
        return
    columns = (
        timeline.time_s,
        timeline.instance,
        timeline.num_used_blocks,
        timeline.num_reserved_blocks,
        timeline.num_running,
        timeline.num_waiting,
    )
    for time_s, instance, used, reserved, running, waiting in zip(
        *(column.tolist() for column in columns), strict=True
    ):
        common = {"ph": "C", "pid": instance, "ts": time_s * _US}
        yield {**common, "name": "KV blocks", "args": {"used": used, "reserved": reserved}}
        yield {**common, "name": "requests", "args": {"running": running, "waiting": waiting}}


def _requests(result: SimulationResult, num_shown: int) -> Iterator[dict[str, Any]]:
    by_instance: dict[int, list[_Stay]] = defaultdict(list)
    for stay in _stays(result, num_shown):
        by_instance[stay.instance].append(stay)
    for instance, stays in sorted(by_instance.items()):
        free: list[int] = []
        busy: list[tuple[float, int]] = []
        num_lanes = _FIRST_LANE
        for stay in sorted(stays, key=lambda s: (s.start_s, s.request)):
            while busy and busy[0][0] <= stay.start_s:
                heapq.heappush(free, heapq.heappop(busy)[1])
            if free:
                lane = heapq.heappop(free)
            else:
                lane, num_lanes = num_lanes, num_lanes + 1
            heapq.heappush(busy, (stay.end_s, lane))
            yield from _slices(result, stay, lane)
        for lane in range(_FIRST_LANE, num_lanes):
            yield {
                "ph": "M", "name": "thread_name", "pid": instance, "tid": lane,
                "args": {"name": f"lane {lane}"},
            }  # fmt: skip


def _stays(result: SimulationResult, num_shown: int) -> Iterator[_Stay]:
    index_of = {life.instance_id: index for index, life in enumerate(result.instances)}
    moves: dict[int, list[MigrationRecord]] = defaultdict(list)
    for migration in result.migrations:
        if migration.outcome == COMMITTED:
            moves[migration.request].append(migration)
    for request in range(num_shown):
        start_s = float(result.dispatched_s[request])
        last = int(result.instance[request])
        if math.isnan(start_s) or last < 0:
            continue
        arrow: str | None = None
        for move in sorted(moves[request], key=lambda m: m.end_s):
            source = index_of[move.source]
            yield _Stay(request, source, start_s, move.end_s, arrow, move.migration_id)
            start_s, arrow = move.end_s, move.migration_id
        is_finished = result.status[request] == RequestStatus.FINISHED
        end_s = float(result.finished_s[request]) if is_finished else result.end_s
        yield _Stay(request, last, start_s, end_s, arrow, None)


def _slices(result: SimulationResult, stay: _Stay, lane: int) -> Iterator[dict[str, Any]]:
    trace, row = result.trace, stay.request
    args = {
        "prompt_tokens": int(trace.num_prompt_tokens[row]),
        "output_tokens": int(trace.num_output_tokens[row]),
        "preemptions": int(result.num_preemptions[row]),
    }
    place = {"pid": stay.instance, "tid": lane}
    bounds = (stay.start_s, float(result.scheduled_s[row]), float(result.first_token_s[row]))
    for name, begin_s, end_s in (
        ("queued", bounds[0], bounds[1]),
        ("prefill", bounds[1], bounds[2]),
        ("decode", bounds[2], stay.end_s),
    ):
        begin = max(stay.start_s, begin_s) if not math.isnan(begin_s) else stay.end_s
        end = min(stay.end_s, end_s) if not math.isnan(end_s) else stay.end_s
        if end > begin:
            yield {
                "ph": "X", "cat": "request", "name": f"{row} {name}", **place,
                "ts": begin * _US, "dur": (end - begin) * _US, "args": args,
            }  # fmt: skip
    common = {"cat": "migration", "name": "migration", **place}
    if stay.arrow_in is not None:
        yield {"ph": "f", "bp": "e", "id": stay.arrow_in, "ts": stay.start_s * _US, **common}
    if stay.arrow_out is not None:
        yield {"ph": "s", "id": stay.arrow_out, "ts": stay.end_s * _US, **common}
