"""Reading traces: the public ones in their own formats, and ours.

`load_trace` recognises a format by the start of the file; a format can also be named. Whatever the
file says, the first request arrives at 0. What was done to the data beyond reading it is in the
notes of the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from llumsched.plugins import unknown_name
from llumsched.simulator.traces.arrivals import gamma_arrivals, quantum_s, spread
from llumsched.simulator.traces.csv_formats import CSV_FORMATS, named_columns
from llumsched.simulator.traces.json_formats import JSON_FORMATS
from llumsched.simulator.traces.reader import Columns, Format, ReadOptions, open_source
from llumsched.simulator.traces.trace import (
    DEFAULT_HASH_BLOCK_SIZE,
    Floats,
    Trace,
    TraceError,
    make_trace,
)

_START_CHARACTERS = 65536
_DAY_S = 86_400.0

FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        trace_format.name: trace_format
        for trace_format in (*(csv.as_format() for csv in CSV_FORMATS), *JSON_FORMATS)
    }
)
"""Every format by name, in the order in which they are tried."""


def load_trace(
    path: str | Path,
    *,
    format: str | None = None,
    columns: str | None = None,
    rate_rps: float | None = None,
    cv: float = 1.0,
    seed: int = 0,
    max_requests: int | None = None,
    hash_block_size: int | None = None,
    count_tokens: Callable[[str], int] | None = None,
) -> Trace:
    """The trace in a file; `columns` names those of a CSV file that is of no known format.

    `rate_rps` scales time so that this many requests arrive in a second; for a file that has no
    arrivals it is the rate of those drawn from a Gamma process of this `cv`. Times that were
    rounded to whole seconds or more are spread over the tick, drawn with `seed`.
    `count_tokens` counts the tokens of a text, for formats that hold text.

    Raises:
        TraceError: the file, or a row of it, cannot be used; or it has no arrivals and no rate was
            given.
    """
    path = Path(path)
    options = ReadOptions(
        max_requests=max_requests, hash_block_size=hash_block_size, count_tokens=count_tokens
    )
    chosen = _format(path, format, columns)
    with open_source(path) as source:
        read = chosen.read(source, options)
    if read.num_left_out:
        read.notes.append(f"rows without prompt or output tokens, left out: {read.num_left_out:,}")
    if not read:
        raise TraceError(f"{path}: no requests in it; {'; '.join(read.notes) or 'it is empty'}")
    rng = np.random.default_rng(seed)
    trace = make_trace(
        path.name,
        arrival_s=_arrivals(path, chosen, read, rate_rps, cv, rng),
        num_prompt_tokens=read.num_prompt_tokens,
        num_output_tokens=read.num_output_tokens,
        scheduling_priority=read.scheduling_priority,
        execution_priority=read.execution_priority,
        client_ids=read.client_ids,
        prefix_hashes=read.prefix_hashes,
        hash_block_size=read.hash_block_size or DEFAULT_HASH_BLOCK_SIZE,
        predicted_output_tokens=read.predicted_output_tokens,
        notes=tuple(read.notes),
    )
    if rate_rps is not None and read.arrival_s is not None:
        if not trace.span_s > 0:
            raise TraceError(f"{path}: all requests arrive at once: no rate to scale")
        trace = trace.scaled(rate=rate_rps / trace.rate_rps)
    return trace


def _format(path: Path, name: str | None, columns: str | None) -> Format:
    if columns is not None:
        if name is not None:
            raise TraceError("format and columns: give one of them")
        return named_columns(columns)
    return detect_format(path) if name is None else find_format(name)


def detect_format(path: Path) -> Format:
    """The format that the start of the file speaks of.

    Raises:
        TraceError: it speaks of none that is known.
    """
    with open_source(path) as source:
        start = source.file.read(_START_CHARACTERS)
    for trace_format in FORMATS.values():
        if trace_format.matches(start):
            return trace_format
    if "ustar" in start[:512]:
        raise TraceError(f"{path}: a tar archive: unpack it and name a file of it")
    if "\0" in start:
        raise TraceError(f"{path}: not text, so no trace; gzip is unpacked, nothing else is")
    raise TraceError(
        f"{path}:1: not the beginning of a trace: {start.partition(chr(10))[0][:80]!r}; it begins"
        f" with the columns, or with an object, of one of: {', '.join(FORMATS)};"
        " those of another CSV file can be named with --columns"
    )


def find_format(name: str) -> Format:
    """The format of this name.

    Raises:
        TraceError: there is none; the message names those there are.
    """
    try:
        return FORMATS[name]
    except KeyError:
        raise TraceError(unknown_name("trace format", name, FORMATS)) from None


def _arrivals(
    path: Path,
    chosen: Format,
    columns: Columns,
    rate_rps: float | None,
    cv: float,
    rng: np.random.Generator,
) -> Floats:
    if columns.arrival_s is None:
        if rate_rps is None:
            raise TraceError(f"{path}: it has no arrival times: give a rate (requests a second)")
        columns.notes.append(f"arrivals drawn: {rate_rps:g} requests/s, gaps of CV {cv:g}")
        return gamma_arrivals(len(columns), rate_rps=rate_rps, cv=cv, rng=rng)
    arrival_s = np.asarray(columns.arrival_s, dtype=np.float64)
    tick = quantum_s(arrival_s) if chosen.spreads else None
    if tick is not None:
        # `spread` sorts, so the rows must be in order too.
        order = np.argsort(arrival_s, kind="stable")
        spread_s = np.empty_like(arrival_s)
        spread_s[order] = spread(arrival_s[order], quantum=tick, rng=rng)
        arrival_s = spread_s
        columns.notes.append(
            f"time stamps are rounded to {tick:.3g} s in the file; each was moved by a random part"
            " of that"
        )
    columns.notes.extend(_stray_gap(np.sort(arrival_s)))
    shifted: Floats = arrival_s - arrival_s.min()
    return shifted


def _stray_gap(arrival_s: Floats) -> Iterator[str]:
    """A note on one gap of days that is most of the trace: such is a wrong time stamp, mostly."""
    gaps = np.diff(arrival_s)
    if len(gaps) and gaps.max() > max(_DAY_S, 0.9 * gaps.sum()):
        row = int(gaps.argmax())
        yield (
            f"{gaps[row] / _DAY_S:,.0f} days without a request lie after request {row}, most of the"
            " trace: is its time stamp, or the next one, right?"
        )
