"""CSV traces: each format is a row of the table at the end, read by one reader.

Columns are found by name, in any order; columns that nobody asks for are ignored.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from llumsched.simulator.traces.reader import Columns, Format, ReadOptions, Source
from llumsched.simulator.traces.trace import TraceError

# The hashes of a long prompt are one field; the limit of the standard library is 128 kB.
csv.field_size_limit(2**31 - 1)

Row = Mapping[str, str]
ReadArrival = Callable[[Source, int, Row, str], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class CsvFormat:
    """Names of the columns; an empty name is a column that the format does not have."""

    name: str
    summary: str
    prompt: str
    output: str
    arrival: str
    read_arrival: ReadArrival
    arrival_is_optional: bool = False
    no_arrival: str = ""
    """A value in the arrival column that stands for none."""
    client: str = ""
    predicted: str = ""
    scheduling_priority: str = ""
    execution_priority: str = ""
    prefix_hashes: str = ""
    hash_block_size: str = ""
    spreads: bool = False

    def as_format(self) -> Format:
        """The format as the registry knows it."""
        return Format(
            name=self.name,
            summary=self.summary,
            matches=lambda start: set(self.required) <= set(_header(start)),
            read=self.read,
            spreads=self.spreads,
        )

    @property
    def required(self) -> tuple[str, ...]:
        """The columns that a file of this format has in any case."""
        needed = (self.prompt, self.output)
        return needed if self.arrival_is_optional else (self.arrival, *needed)

    def read(self, source: Source, options: ReadOptions) -> Columns:
        """Every row, or as many as are wanted."""
        reader = csv.reader(source.file, skipinitialspace=True)
        header = [name.strip() for name in next(reader, [])]
        missing = [name for name in self.required if name not in header]
        if missing:
            raise source.error(
                1,
                f"a trace of format {self.name!r} has the columns {', '.join(self.required)};"
                f" missing here: {', '.join(missing)}",
            )
        columns = Columns()
        self._add_optional(columns, header)
        for line, row in _rows(source, reader, header):
            num_prompt_tokens = source.length(line, row, self.prompt)
            num_output_tokens = source.length(line, row, self.output)
            if not columns.is_request(num_prompt_tokens, num_output_tokens):
                continue
            if columns.arrival_s is not None:
                if self.no_arrival and row[self.arrival] == self.no_arrival:
                    columns.arrival_s = None
                else:
                    columns.arrival_s.append(self.read_arrival(source, line, row, self.arrival))
            columns.num_prompt_tokens.append(num_prompt_tokens)
            columns.num_output_tokens.append(num_output_tokens)
            self._read_optional(source, line, row, columns)
            if options.is_enough(columns):
                break
        return columns

    def _add_optional(self, columns: Columns, header: list[str]) -> None:
        if self.arrival not in header:
            columns.arrival_s = None
        if self.client in header:
            columns.client_ids = []
        if self.predicted in header:
            columns.predicted_output_tokens = []
        if self.scheduling_priority in header:
            columns.scheduling_priority = []
        if self.execution_priority in header:
            columns.execution_priority = []
        if self.prefix_hashes in header:
            columns.prefix_hashes = []

    def _read_optional(self, source: Source, line: int, row: Row, columns: Columns) -> None:
        if columns.client_ids is not None:
            columns.client_ids.append(row[self.client])
        for values, name in (
            (columns.predicted_output_tokens, self.predicted),
            (columns.scheduling_priority, self.scheduling_priority),
            (columns.execution_priority, self.execution_priority),
        ):
            if values is not None:
                values.append(source.whole(line, row, name))
        if columns.prefix_hashes is not None:
            columns.hash_block_size = source.whole(line, row, self.hash_block_size, at_least=1)
            try:
                hashes = [int(word) for word in row[self.prefix_hashes].split()]
            except ValueError:
                raise source.error(
                    line, f"{self.prefix_hashes!r} must be whole numbers with spaces between"
                ) from None
            columns.prefix_hashes.append(hashes)


def _header(start: str) -> list[str]:
    return [name.strip() for name in next(csv.reader(start.splitlines()[:1]), [])]


def _rows(
    source: Source, reader: Iterator[list[str]], header: list[str]
) -> Iterator[tuple[int, Row]]:
    for line, row in enumerate(reader, start=2):
        if not row:
            continue
        if len(row) != len(header):
            raise source.error(line, f"{len(row)} values where the header has {len(header)}")
        yield line, dict(zip(header, row, strict=True))


def _utc(source: Source, line: int, row: Row, key: str) -> float:
    """Seconds since 1970 of a date and time, which is UTC unless it says otherwise."""
    try:
        when = datetime.fromisoformat(row[key])
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise source.error(
            line, f"{key!r} must be a date and time (2023-11-16 18:15:46.68), not {row[key]!r:.60}"
        ) from None


def _seconds(source: Source, line: int, row: Row, key: str) -> float:
    return source.seconds(line, row, key)


def _seconds_or_utc(source: Source, line: int, row: Row, key: str) -> float:
    try:
        float(row[key])
    except ValueError:
        return _utc(source, line, row, key)
    return _seconds(source, line, row, key)


OWN_CSV = CsvFormat(
    name="llumsched-csv",
    summary="our own CSV: arrival_s, num_prompt_tokens, num_output_tokens, and optional columns",
    arrival="arrival_s",
    read_arrival=_seconds,
    arrival_is_optional=True,
    prompt="num_prompt_tokens",
    output="num_output_tokens",
    client="client_id",
    predicted="predicted_output_tokens",
    scheduling_priority="scheduling_priority",
    execution_priority="execution_priority",
    prefix_hashes="prefix_hashes",
    hash_block_size="hash_block_size",
)

CSV_FORMATS = (
    OWN_CSV,
    CsvFormat(
        name="azure",
        summary="Azure LLM inference 2023 and 2024: TIMESTAMP, ContextTokens, GeneratedTokens",
        arrival="TIMESTAMP",
        read_arrival=_utc,
        # What files of lengths alone, in the same columns, have for a time (those of Nanoflow).
        no_arrival="XXX",
        prompt="ContextTokens",
        output="GeneratedTokens",
    ),
    CsvFormat(
        name="burstgpt",
        summary="BurstGPT v1 and v2: Timestamp (s), Request tokens, Response tokens",
        arrival="Timestamp",
        read_arrival=_seconds,
        prompt="Request tokens",
        output="Response tokens",
        client="Session ID",
        spreads=True,
    ),
    CsvFormat(
        name="vidur",
        summary="Vidur: arrived_at (s; may be missing), num_prefill_tokens, num_decode_tokens",
        arrival="arrived_at",
        read_arrival=_seconds,
        arrival_is_optional=True,
        prompt="num_prefill_tokens",
        output="num_decode_tokens",
        predicted="num_predicted_decode_tokens",
    ),
    CsvFormat(
        name="apex",
        summary="APEX: start_time_s, context_tokens, generated_tokens",
        arrival="start_time_s",
        read_arrival=_seconds,
        prompt="context_tokens",
        output="generated_tokens",
    ),
    CsvFormat(
        name="servegen",
        summary="what ServeGen generates, as CSV: timestamp (s), input_tokens, output_tokens",
        arrival="timestamp",
        read_arrival=_seconds,
        prompt="input_tokens",
        output="output_tokens",
    ),
)

_NAMED = ("arrival", "prompt", "output", "client", "predicted")


def named_columns(text: str) -> Format:
    """The format of a CSV file whose columns are named: `arrival=t,prompt=in,output=out`.

    Arrivals are seconds, or dates and times; without them a rate is needed.

    Raises:
        TraceError: the text cannot be understood; the message shows how it looks.
    """
    named: dict[str, str] = {}
    for pair in text.split(","):
        role, equals, column = (part.strip() for part in pair.partition("="))
        if not equals or not column or role not in _NAMED or role in named:
            raise TraceError(
                f"columns {text!r}: {pair.strip()!r} must be one of"
                f" {', '.join(f'{name}=COLUMN' for name in _NAMED)}, each once, with commas between"
            )
        named[role] = column
    missing = [role for role in ("prompt", "output") if role not in named]
    if missing:
        raise TraceError(f"columns {text!r}: say which column has the {missing[0]} tokens")
    return CsvFormat(
        name="as named",
        summary="",
        arrival=named.get("arrival", ""),
        read_arrival=_seconds_or_utc,
        arrival_is_optional="arrival" not in named,
        prompt=named["prompt"],
        output=named["output"],
        client=named.get("client", ""),
        predicted=named.get("predicted", ""),
    ).as_format()
