"""Common parts of loaders: a text file that knows its lines, and the columns being filled.

A file is read line by line, so that the first requests of a very long one are cheap. An error names
the file, the line and what was expected there. gzip is recognised by its first bytes.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from llumsched.simulator.traces.trace import TraceError

_GZIP_MAGIC = b"\x1f\x8b"
MOST = 10**12
"""Beyond this no number of tokens, of a class or of a block is meant."""


@dataclass(slots=True, kw_only=True)
class Columns:
    """Columns of a trace while its rows are read; `arrival_s` is None for lengths alone."""

    arrival_s: list[float] | None = field(default_factory=list)
    num_prompt_tokens: list[int] = field(default_factory=list)
    num_output_tokens: list[int] = field(default_factory=list)
    scheduling_priority: list[int] | None = None
    execution_priority: list[int] | None = None
    client_ids: list[str] | None = None
    prefix_hashes: list[list[int]] | None = None
    hash_block_size: int | None = None
    predicted_output_tokens: list[int] | None = None
    notes: list[str] = field(default_factory=list)

    num_left_out: int = 0
    """Rows that are no request: nothing in, or nothing out."""

    def is_request(self, num_prompt_tokens: int, num_output_tokens: int) -> bool:
        """True if a row is a request; one that is not is counted and left out, in every format."""
        is_one = num_prompt_tokens > 0 and num_output_tokens > 0
        self.num_left_out += not is_one
        return is_one

    def __len__(self) -> int:
        return len(self.num_prompt_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """Options of a reader."""

    max_requests: int | None = None
    hash_block_size: int | None = None
    count_tokens: Callable[[str], int] | None = None

    def is_enough(self, columns: Columns) -> bool:
        """True if no more rows are wanted."""
        return self.max_requests is not None and len(columns) >= self.max_requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A trace format: how it is recognised and read.

    `matches` gets the start of the file; `spreads` is set where the published data has rounded
    times.
    """

    name: str
    summary: str
    matches: Callable[[str], bool]
    read: Callable[[Source, ReadOptions], Columns]
    spreads: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """An open file and its name, for errors."""

    path: Path
    file: TextIO

    def error(self, line: int, message: str) -> TraceError:
        """An error at a line, counted from 1."""
        return TraceError(f"{self.path}:{line}: {message}")

    def json_lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Line number and object of each line that is not blank."""
        for number, line in enumerate(self.file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise self.error(number, f"not JSON: {error.msg} (column {error.colno})") from error
            except (ValueError, RecursionError) as error:
                raise self.error(number, f"not JSON that can be read: {error}") from error
            if not isinstance(row, dict):
                raise self.error(number, f"must be a JSON object, not {type(row).__name__}")
            yield number, row

    def length(self, line: int, row: Mapping[str, Any], key: str) -> int:
        """Tokens out of a row; 0 for none, which may be written as nothing or as less than one."""
        value = self._get(line, row, key)
        return 0 if value in (None, "") else max(0, self.whole(line, row, key, at_least=None))

    def whole(
        self, line: int, row: Mapping[str, Any], key: str, *, at_least: int | None = 0
    ) -> int:
        """A whole number out of a row."""
        value = self._get(line, row, key)
        try:
            number = int(value)
            exact = number == float(value)
        except (TypeError, ValueError, OverflowError):
            exact = False
        if not exact or isinstance(value, bool):
            raise self.error(line, f"{key!r} must be a whole number, not {value!r:.60}")
        if at_least is not None and number < at_least:
            raise self.error(line, f"{key!r} must be at least {at_least}, not {value!r:.60}")
        if number > MOST:
            raise self.error(line, f"{key!r} must be at most {MOST:,}, not {value!r:.60}")
        return number

    def seconds(self, line: int, row: Mapping[str, Any], key: str) -> float:
        """A finite number out of a row."""
        value = self._get(line, row, key)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if not abs(number) < float("inf") or isinstance(value, bool):
            raise self.error(line, f"{key!r} must be a number, not {value!r:.60}")
        return number

    def _get(self, line: int, row: Mapping[str, Any], key: str) -> Any:
        if key not in row:
            raise self.error(line, f"{key!r} is missing; this row has: {', '.join(row)}")
        return row[key]


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Open a text file, unpacked if it is gzip.

    Raises:
        TraceError: it cannot be read, or is not UTF-8 text.
    """
    try:
        with path.open("rb") as raw:
            is_gzip = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            binary = gzip.GzipFile(fileobj=raw) if is_gzip else raw
            with io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as text:
                yield Source(path, text)
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TraceError(f"{path}: cannot be read: {reason}") from error
    except zlib.error as error:
        raise TraceError(f"{path}: cannot be unpacked, it is damaged: {error}") from error
    except csv.Error as error:
        raise TraceError(f"{path}: not CSV: {error}") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not UTF-8 text: {error}") from error
