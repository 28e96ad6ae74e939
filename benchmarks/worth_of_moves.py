"""Wins that moves were expected to bring, beside those that they brought: is the cost model right?

`adaptive` moves a request where it expects to save more waiting than the move costs, and says how
much. Afterwards each moved request is followed as if it had stayed: the time in which its source
had no room for it is what the move has saved (`llumsched_migration_won_seconds` of a pool that
serves is the same). That is an upper bound, since nobody knows what else the source would then have
been sent; and one move either saves a whole wait or nothing, so moves are compared by tenths, in
the order of what was expected of them.

Simulated: bursts (a generator with the lengths of BurstGPT) at the capacity of 8 instances, seeds
one after another until there are 1,000 moves that were expected to save something. Moves that make
room for a prompt that is held have another end, and are told apart.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks._report import Figure, Report, Table, main
from llumsched.config import Config
from llumsched.core.actions import StartMigration
from llumsched.decision_log import read_segment, segments_of
from llumsched.scheduler.migration_worth import MigrationWorth, MigrationWorths
from llumsched.simulator.hardware.spec import load_hardware
from llumsched.simulator.options import SimulationOptions
from llumsched.simulator.results.metrics import COMMITTED
from llumsched.simulator.results.records import MigrationRecord
from llumsched.simulator.simulation import simulate
from llumsched.wire.control import MigrationStatistics, ReportMigration
from scripts import plots
from scripts.comparison.workloads import WORKLOADS

BENCHMARK = "Worth of moves"

WORKLOAD = next(workload for workload in WORKLOADS if workload.name == "bursts")
# What `least_requests` sustains, by docs/comparison.md.
RATE_RPS = 25.0
NUM_INSTANCES = 8
NUM_MOVES, NUM_MOVES_QUICK = 1_000, 100
MOST_SEEDS = 40
NUM_BINS = 10
DOCS = Path(__file__).parents[1] / "docs" / "benchmarks"
PLOT = "worth-of-moves.svg"
BALANCE, ROOM = "an eviction feared", "room for a held prompt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """One move: seconds that it was expected to win, and that it won; and what it was for."""

    kind: str
    expected_s: float
    won_s: float


def run(quick: bool) -> Report:
    wanted = NUM_MOVES_QUICK if quick else NUM_MOVES
    moves: list[Worth] = []
    num_seeds = 0
    while len(moves) < wanted and num_seeds < MOST_SEEDS:
        num_seeds += 1
        moves += _moves(num_seeds)
    feared = [move for move in moves if move.kind == BALANCE]
    bins = _tenths(feared)
    if not quick:
        _plot(bins)
    expected, won = ([getattr(m, name) for m in feared] for name in ("expected_s", "won_s"))
    figures = [
        Figure(name="moves with an expectation", value=len(moves), unit=""),
        Figure(
            name="won by moves before an eviction feared, over expected",
            value=sum(won) / sum(expected),
            unit="",
        ),
        Figure(
            name="tenths in which more was won the more was expected (rank correlation)",
            value=_rank_correlation([b.expected_s for b in bins], [b.won_s for b in bins]),
            unit="",
            at_least=0.6,
        ),
        Figure(
            name="moves before an eviction feared that won nothing",
            value=100 * sum(seconds == 0 for seconds in won) / len(won),
            unit="%",
        ),
    ]
    return Report(
        figures=figures,
        tables=[_table(moves, bins)],
        notes=[
            (
                f"{num_seeds} seeds of {WORKLOAD.num_requests} requests at {RATE_RPS:g} a second,"
                f" on {NUM_INSTANCES} x {WORKLOAD.hardware}."
            ),
            *([] if quick else [f"![Won beside expected, by tenths]({PLOT})"]),
        ],
    )


def _moves(seed: int) -> Iterator[Worth]:
    """Moves of one simulation that were expected to win something."""
    trace = WORKLOAD.make(Path(), RATE_RPS, WORKLOAD.num_requests, seed)
    hardware = load_hardware(WORKLOAD.hardware)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # Kernel times alone: moves and waits are what is looked at here.
        warnings.simplefilter("ignore")
        options = SimulationOptions(
            hardware=hardware,
            num_instances=NUM_INSTANCES,
            config=Config(policy="adaptive"),
            decision_log=Path(folder),
            seed=seed,
        )
        result = simulate(trace, options)
        ended = sorted(
            (move for move in result.migrations if move.outcome == COMMITTED),
            key=lambda move: move.end_s,
        )
        yield from _followed(Path(folder), ended, hardware.kv.block_size)


def _followed(log: Path, ended: Sequence[MigrationRecord], block_size: int) -> Iterator[Worth]:
    worths = MigrationWorths()
    kinds: dict[str, str] = {}
    told: list[MigrationWorth] = []
    following = iter(ended)
    move = next(following, None)
    for segment in segments_of(log):
        for decision in read_segment(segment)[1]:
            while move is not None and move.end_s <= decision.now:
                told += worths.migration_ended(_report(move, block_size), move.end_s)
                move = next(following, None)
            for action in decision.actions:
                if isinstance(action, StartMigration):
                    is_for_room = action.reason.startswith(ROOM)
                    kinds[action.migration_id] = ROOM if is_for_room else BALANCE
            told += worths.handled(decision.event, decision.actions, decision.now)
    for worth in told:
        if worth.expected_s is not None:
            yield Worth(
                kind=kinds[worth.migration_id], expected_s=worth.expected_s, won_s=worth.won_s
            )


def _report(move: MigrationRecord, block_size: int) -> ReportMigration:
    return ReportMigration(
        migration_id=move.migration_id,
        request_id=str(move.request),
        source=move.source,
        destination=move.destination,
        outcome=move.outcome,
        reason="",
        statistics=MigrationStatistics(
            num_stages=move.num_stages,
            num_blocks=move.num_blocks,
            num_cached_blocks=0,
            num_bytes=0,
            num_tokens=move.num_blocks * block_size,
            num_output_tokens=0,
            total_s=move.end_s - move.start_s,
            suspended_s=move.downtime_s,
            # Load reports tell it from then on.
            step_time_s=0.03,
            transport="simulated",
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """A tenth of the moves: mean seconds expected and won, and the standard error of the latter."""

    num_moves: int
    expected_s: float
    won_s: float
    error_s: float


def _tenths(moves: Sequence[Worth]) -> list[Bin]:
    ordered = sorted(moves, key=lambda move: move.expected_s)
    bins = []
    for part in np.array_split(np.arange(len(ordered)), NUM_BINS):
        of_it = [ordered[i] for i in part.tolist()]
        won = [move.won_s for move in of_it]
        bins.append(
            Bin(
                num_moves=len(of_it),
                expected_s=statistics.fmean(move.expected_s for move in of_it),
                won_s=statistics.fmean(won),
                error_s=statistics.stdev(won) / len(won) ** 0.5,
            )
        )
    return bins


def _rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    ranks = [np.argsort(np.argsort(values)).tolist() for values in (first, second)]
    return statistics.correlation(*ranks)


def _table(moves: Sequence[Worth], bins: Sequence[Bin]) -> Table:
    rows: list[list[str | float]] = [
        [f"{BALANCE}, tenth {i}", b.num_moves, b.expected_s, b.won_s, b.error_s]
        for i, b in enumerate(bins, start=1)
    ]
    for_room = [move for move in moves if move.kind == ROOM]
    if for_room:
        expected_s = statistics.fmean(move.expected_s for move in for_room)
        won_s = statistics.fmean(move.won_s for move in for_room)
        rows.append([ROOM, len(for_room), expected_s, won_s, "-"])
    return Table(
        title="Seconds a move",
        columns=["moves for", "moves", "expected", "won", "standard error"],
        rows=rows,
    )


def _plot(bins: Sequence[Bin]) -> None:
    series = {
        "won": [(b.expected_s, b.won_s) for b in bins if b.won_s > 0],
        "as expected": [(b.expected_s, b.expected_s) for b in bins],
    }
    title = "Waiting that a move has won, by what was expected of it (a tenth of the moves a point)"
    text = plots.lines(title, "expected, s", "won, s", series)
    (DOCS / PLOT).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(run))
