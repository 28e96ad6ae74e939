"""A trace: what arrives, as columns, in the order of arrival.

Row `i` of every column is request `i`, and stays so through the simulation and into the records
that are exported. Arrivals begin where the trace says (loaders make the first one 0) and never
decrease; lengths are tokens, at least 1. The true output length is in here because the engine
model needs it to know when a request ends: nothing that schedules may read it.

This module does not know where a trace comes from (`loaders`, `generators`) nor what becomes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llumsched.core.types import PriorityClass

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
PrefixHashes = tuple[tuple[int, ...], ...]

DEFAULT_HASH_BLOCK_SIZE = 16
MOST_TOKENS = 10**9
"""A longer prompt or output is a mistake."""
MOST_SECONDS = 1e11
"""An arrival further from 0 (three thousand years) is a mistake."""


class TraceError(ValueError):
    """A trace cannot be read or made; the message names the place and the fix."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Requests as columns of equal length, sorted by arrival; make one with `make_trace`.

    `prefix_hashes[i]` are the chained hashes of the full blocks of `hash_block_size` tokens at the
    start of prompt `i`: equal hashes are equal prefixes. `notes` are what a reader of any result
    has to be told about this trace.
    """

    name: str
    arrival_s: Floats
    num_prompt_tokens: Ints
    num_output_tokens: Ints
    scheduling_priority: Ints
    execution_priority: Ints
    client_ids: tuple[str, ...] | None = None
    prefix_hashes: PrefixHashes | None = None
    hash_block_size: int = DEFAULT_HASH_BLOCK_SIZE
    predicted_output_tokens: Ints | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def span_s(self) -> float:
        """From the first arrival to the last."""
        return float(self.arrival_s[-1] - self.arrival_s[0]) if len(self) else 0.0

    @property
    def rate_rps(self) -> float:
        """Mean requests a second; NaN when all arrive at once."""
        return (len(self) - 1) / self.span_s if self.span_s > 0 else float("nan")

    def head(self, num_requests: int) -> Trace:
        """The first requests."""
        return self._rows(slice(num_requests))

    def scaled(self, *, rate: float = 1.0, length: float = 1.0) -> Trace:
        """Arrivals `rate` times as dense, prompts and outputs `length` times as long (rounded up).

        A shared prefix grows and shrinks with its prompt: the block that a hash stands for is
        scaled, so the share of a prompt that is shared stays what it was.

        Raises:
            TraceError: a factor is not positive.
        """
        for name, factor in (("rate", rate), ("length", length)):
            if not 0 < factor < float("inf"):
                raise TraceError(f"the factor for {name} must be above 0, not {factor!r}")
        notes = self.notes
        if rate != 1.0:
            notes += (f"arrivals {rate:g} times as dense as in the trace",)
        trace = replace(self, arrival_s=self.arrival_s / rate, notes=notes)
        return trace if length == 1.0 else trace._with_length(length)

    def _with_length(self, factor: float) -> Trace:
        def scale(tokens: Ints) -> Ints:
            scaled = np.maximum(np.ceil(tokens * factor), 1)
            if len(scaled) and scaled.max() > MOST_TOKENS:
                raise TraceError(
                    f"lengths {factor:g} times those of the trace are up to {scaled.max():.3g}"
                    f" tokens; at most {MOST_TOKENS:,} are meant"
                )
            whole: Ints = scaled.astype(np.int64)
            return whole

        prompts = scale(self.num_prompt_tokens)
        block_size = max(1, round(min(self.hash_block_size * factor, MOST_TOKENS)))
        hashes = self.prefix_hashes
        if hashes is not None:
            full = (prompts // block_size).tolist()
            hashes = tuple(row[:most] for row, most in zip(hashes, full, strict=True))
        predicted = self.predicted_output_tokens
        return replace(
            self,
            num_prompt_tokens=prompts,
            num_output_tokens=scale(self.num_output_tokens),
            predicted_output_tokens=None if predicted is None else scale(predicted),
            prefix_hashes=hashes,
            hash_block_size=self.hash_block_size if hashes is None else block_size,
            notes=(*self.notes, f"lengths {factor:g} times those of the trace"),
        )

    def resampled(self, seed: int) -> Trace:
        """The same requests in the same order, with gaps drawn from those of the trace.

        Runs of about the square root of their number are drawn together and wrap around at the end
        (circular block bootstrap; Politis and Romano, 1992), so that a burst stays one; the rate is
        that of the trace.
        """
        gaps = np.diff(self.arrival_s)
        if not len(gaps) or not self.span_s > 0:
            return self
        size = max(1, round(len(gaps) ** 0.5))
        rng = np.random.default_rng([seed, 2])
        starts = rng.integers(0, len(gaps), -(-len(gaps) // size))
        drawn = gaps[(starts[:, None] + np.arange(size)).ravel()[: len(gaps)] % len(gaps)]
        if not drawn.sum() > 0:
            return self
        arrivals = np.concatenate([[0.0], np.cumsum(drawn * (self.span_s / drawn.sum()))])
        note = f"gaps between arrivals drawn anew in blocks of {size}, seed {seed}"
        return replace(self, arrival_s=self.arrival_s[0] + arrivals, notes=(*self.notes, note))

    def is_same(self, other: Trace) -> bool:
        """True if a simulation could not tell the two apart; names and notes do not count."""
        return all(
            np.array_equal(mine, theirs)
            if isinstance(mine, np.ndarray) and isinstance(theirs, np.ndarray)
            else mine is theirs or bool(mine == theirs)
            for name in self.__dataclass_fields__
            if name not in ("name", "notes")
            for mine, theirs in [(getattr(self, name), getattr(other, name))]
        )

    def with_priorities(self, high_share: float, *, seed: int) -> Trace:
        """A random share of the requests made high priority, in both senses of the word.

        Raises:
            TraceError: the share is not between 0 and 1.
        """
        if not 0 <= high_share <= 1:
            raise TraceError(f"the share of high priority must be in [0, 1], not {high_share!r}")
        rng = np.random.default_rng(seed)
        is_high = rng.random(len(self)) < high_share
        priority = np.where(is_high, PriorityClass.HIGH, PriorityClass.NORMAL).astype(np.int64)
        note = f"{high_share:.3g} of the requests, drawn at random, are of high priority"
        return replace(
            self,
            scheduling_priority=priority,
            execution_priority=priority,
            notes=(*self.notes, note),
        )

    def _rows(self, rows: slice) -> Trace:
        predicted = self.predicted_output_tokens
        return replace(
            self,
            arrival_s=self.arrival_s[rows],
            num_prompt_tokens=self.num_prompt_tokens[rows],
            num_output_tokens=self.num_output_tokens[rows],
            scheduling_priority=self.scheduling_priority[rows],
            execution_priority=self.execution_priority[rows],
            client_ids=None if self.client_ids is None else self.client_ids[rows],
            prefix_hashes=None if self.prefix_hashes is None else self.prefix_hashes[rows],
            predicted_output_tokens=None if predicted is None else predicted[rows],
        )


def make_trace(
    name: str,
    *,
    arrival_s: ArrayLike,
    num_prompt_tokens: ArrayLike,
    num_output_tokens: ArrayLike,
    scheduling_priority: ArrayLike | None = None,
    execution_priority: ArrayLike | None = None,
    client_ids: Sequence[str] | None = None,
    prefix_hashes: Sequence[Sequence[int]] | None = None,
    hash_block_size: int = DEFAULT_HASH_BLOCK_SIZE,
    predicted_output_tokens: ArrayLike | None = None,
    notes: tuple[str, ...] = (),
) -> Trace:
    """A trace from columns in any order of arrival; equal arrivals keep their order.

    Without priorities every request is of normal priority.

    Raises:
        TraceError: columns of different length, an arrival that is no number, a length below 1, or
            more prefix hashes than a prompt has full blocks.
    """
    arrivals = np.asarray(arrival_s, dtype=np.float64)
    if not np.isfinite(arrivals).all():
        raise TraceError(f"{name}: an arrival time is not a number")
    if len(arrivals) and np.abs(arrivals).max() > MOST_SECONDS:
        raise TraceError(f"{name}: an arrival at {np.abs(arrivals).max():.3g} s is no time")
    order = np.argsort(arrivals, kind="stable")

    def column(what: str, values: ArrayLike | None, at_least: int, default: int = 0) -> Ints:
        if values is None:
            return np.full(len(arrivals), default, dtype=np.int64)
        array = np.asarray(values, dtype=np.int64)
        _check_length(name, what, len(array), len(arrivals))
        if len(array) and array.min() < at_least:
            raise TraceError(f"{name}: {what} must be at least {at_least}, not {array.min()}")
        if len(array) and array.max() > MOST_TOKENS:
            raise TraceError(f"{name}: {what} must be at most {MOST_TOKENS:,}, not {array.max()}")
        return array[order]

    prompts = column("num_prompt_tokens", num_prompt_tokens, 1)
    clients, hashes = None, None
    if client_ids is not None:
        _check_length(name, "client_ids", len(client_ids), len(arrivals))
        clients = tuple(client_ids[i] for i in order.tolist())
    if prefix_hashes is not None:
        _check_length(name, "prefix_hashes", len(prefix_hashes), len(arrivals))
        hashes = tuple(tuple(prefix_hashes[i]) for i in order.tolist())
        for row, num_tokens in zip(hashes, prompts.tolist(), strict=True):
            if len(row) * hash_block_size > num_tokens:
                raise TraceError(
                    f"{name}: {len(row)} prefix hashes of {hash_block_size} tokens for a prompt of"
                    f" {num_tokens}; give full blocks only, and the right hash_block_size"
                )
    predicted = predicted_output_tokens
    return Trace(
        name=name,
        arrival_s=arrivals[order],
        num_prompt_tokens=prompts,
        num_output_tokens=column("num_output_tokens", num_output_tokens, 1),
        scheduling_priority=column("scheduling_priority", scheduling_priority, PriorityClass.LOW),
        execution_priority=column("execution_priority", execution_priority, PriorityClass.LOW),
        client_ids=clients,
        prefix_hashes=hashes,
        hash_block_size=hash_block_size,
        predicted_output_tokens=(
            None if predicted is None else column("predicted_output_tokens", predicted, 0)
        ),
        notes=notes,
    )


def _check_length(name: str, what: str, found: int, expected: int) -> None:
    if found != expected:
        raise TraceError(f"{name}: {what} has {found} rows, arrival_s has {expected}")
