"""Writing results: a record a request as CSV or Parquet, and traces in our own CSV.

The columns of a record are the trace's, what happened, and the latencies of `metrics`; a time that
never came is an empty cell (a null in Parquet). A trace that is written and loaded again is the
same trace.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llumsched.simulator.results.metrics import latencies
from llumsched.simulator.results.records import RequestStatus
from llumsched.simulator.results.result import SimulationResult
from llumsched.simulator.traces.trace import Floats, Trace


class ExportError(RuntimeError):
    """A result cannot be written as asked; the message names the fix."""


def request_columns(result: SimulationResult) -> dict[str, Sequence[Any] | np.ndarray[Any, Any]]:
    """Name -> column, a value a request, in the rows of the trace."""
    trace, times = result.trace, latencies(result)
    names = {int(status): status.name.lower() for status in RequestStatus}
    instances = {-1: "", **{i: life.instance_id for i, life in enumerate(result.instances)}}
    columns: dict[str, Sequence[Any] | np.ndarray[Any, Any]] = {
        "request": np.arange(len(trace)),
        "arrival_s": trace.arrival_s,
        "num_prompt_tokens": trace.num_prompt_tokens,
        "num_output_tokens": result.num_output_tokens,
        "scheduling_priority": trace.scheduling_priority,
        "execution_priority": trace.execution_priority,
        "status": [names[status] for status in result.status.tolist()],
        "instance": [instances[index] for index in result.instance.tolist()],
        "dispatched_s": result.dispatched_s,
        "scheduled_s": result.scheduled_s,
        "first_token_s": result.first_token_s,
        "finished_s": result.finished_s,
        "ttft_s": times.ttft_s,
        "tpot_s": times.tpot_s,
        "e2e_s": times.e2e_s,
        "queueing_s": times.queueing_s,
        "itl_max_s": times.itl_max_s,
        "num_cached_tokens": result.num_cached_tokens,
        "num_preemptions": result.num_preemptions,
        "preemption_loss_s": result.preemption_loss_s,
        "num_migrations": result.num_migrations,
        "migration_downtime_s": result.migration_downtime_s,
    }
    if trace.client_ids is not None:
        columns["client_id"] = trace.client_ids
    return columns


def write_csv(result: SimulationResult, path: Path) -> None:
    """The records as CSV; numbers are written so that they read back as the same ones."""
    columns = request_columns(result)
    _write_csv(path, list(columns), zip(*map(_cells, columns.values()), strict=True))


def write_parquet(result: SimulationResult, path: Path) -> None:
    """The records as Parquet, which needs pyarrow.

    Raises:
        ExportError: pyarrow is not installed.
    """
    check_parquet()
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {
        name: pa.array(column, from_pandas=True) for name, column in request_columns(result).items()
    }
    pq.write_table(pa.table(arrays), path, compression="zstd")


def check_parquet() -> None:
    """True if Parquet can be written, asked before a long run rather than after it.

    Raises:
        ExportError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "pyarrow":
            raise
        raise ExportError(
            "Parquet needs pyarrow, which is not installed: pip install 'llumsched[parquet]', or"
            " use the CSV"
        ) from error


def write_trace(trace: Trace, path: Path) -> None:
    """A trace in our own CSV, with the optional columns that it has."""
    columns: dict[str, Any] = {
        "arrival_s": trace.arrival_s,
        "num_prompt_tokens": trace.num_prompt_tokens,
        "num_output_tokens": trace.num_output_tokens,
    }
    if trace.scheduling_priority.any() or trace.execution_priority.any():
        columns["scheduling_priority"] = trace.scheduling_priority
        columns["execution_priority"] = trace.execution_priority
    if trace.client_ids is not None:
        columns["client_id"] = trace.client_ids
    if trace.predicted_output_tokens is not None:
        columns["predicted_output_tokens"] = trace.predicted_output_tokens
    if trace.prefix_hashes is not None:
        columns["hash_block_size"] = [trace.hash_block_size] * len(trace)
        columns["prefix_hashes"] = [" ".join(map(str, row)) for row in trace.prefix_hashes]
    _write_csv(path, list(columns), zip(*map(_cells, columns.values()), strict=True))


def _cells(column: Sequence[Any] | np.ndarray[Any, Any]) -> Iterator[Any]:
    values = column.tolist() if isinstance(column, np.ndarray) else column
    # `value != value` is true of NaN alone.
    return ("" if value != value else value for value in values)


def _write_csv(path: Path, header: list[str], rows: Iterator[tuple[Any, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def quantile_curve(values: Floats, num_points: int = 200) -> tuple[list[float], list[float]]:
    """(value, share of values at or below it): a cumulative distribution in few points.

    The points lie closer towards the upper end, where the tail is read.
    """
    known = values[~np.isnan(values)]
    if not len(known):
        return [], []
    shares = 1 - np.linspace(1, 0, num_points) ** 2
    return np.quantile(known, shares).tolist(), shares.tolist()
