"""Cost of a migration: the client's pause, the other requests, bytes and memory.

Two instances serve streamed, greedy requests; each is told to move one while it decodes, and every
token's arrival at the client is recorded. The pause is the gap between the last token of the source
and the first of the destination, and is held against the gaps of the same answer before the move:
one ordinary decode step. Beside it: stop-and-copy (the same two instances, all blocks in one stage
while the request stands still) and recompute (the request is sent again with what it has put out).
No prompt is asked twice, so no prefix is found in a cache.

The others: some requests decode on both instances while one with a long context moves past them;
their gaps while it moves are held against those just before, with the same requests in each batch.
One row has the destination compute prompts of 3000 tokens meanwhile: the pause is held against the
destination's steps then, which another answer there tells.

The control run asks plain vLLM, without any move, whether an answer is the same alone and in a
batch: what a batch changes, no migration can keep. The tests of exactness use float32.

A quick run has prompts of 1000 tokens at most, and neither stop-and-copy nor the control run.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import _batch_effects, _transports
from benchmarks._migration_client import Move, Moves, staging_num_bytes
from benchmarks._report import Figure, Report, Table, main
from benchmarks._servers import ENGINE_FLAGS, llumsched
from scripts import plots
from scripts.pages import number

BENCHMARK = "Migration"

CONTEXTS, QUICK_CONTEXTS = (256, 512, 1000, 2000, 3000), (256, 1000)
NUM_OTHERS = 2
# Under way at the destination while requests move there, each as long as the longest context.
NUM_PROMPTS = 4
STAGE_NUM_BLOCKS = 64
DOCS = Path(__file__).parents[1] / "docs" / "benchmarks"
PLOTS = {"pause": "Pause as the client sees it", "total": "A migration from order to commit"}

LIVE = "policy: round_robin\n"
STOP_AND_COPY = (
    "policy: round_robin\nmigration: {final_stage_blocks: 100000, max_final_stage_blocks: 100000}\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Moves by context, in seconds and bytes; ``recompute_s`` are pauses as well.

    A quick run has no ``stop_and_copy``.
    """

    live: dict[int, list[Move]]
    stop_and_copy: dict[int, list[Move]]
    recompute_s: dict[int, list[float]]
    loaded: list[Move]
    among_prompts: list[Move]
    """``step_s`` is of the destination's steps, which compute prompts."""
    others: dict[str, list[float]]
    """Gaps of the other requests, by ``source``/``destination`` and ``before``/``during``."""
    peak_reserved_blocks: int
    staging_num_bytes: int

    @property
    def short(self) -> int:
        """Tokens of the shortest context."""
        return min(self.live)

    @property
    def long(self) -> int:
        """Tokens of the longest context."""
        return max(self.live)


def run(quick: bool) -> Report:
    transports = _transports.measure(STAGE_NUM_BLOCKS, quick=quick)
    differing = {} if quick else _batch_effects.measure()
    measured = _measure(quick)
    if not quick:
        _draw(measured)
    return Report(
        figures=[*_figures(measured, transports), *_control(differing)],
        tables=_tables(measured),
        notes=[]
        if quick
        else [f"![{title}](migration-{name}.svg)" for name, title in PLOTS.items()],
    )


def _measure(quick: bool) -> Measured:
    # Long prompts take most of the time, so what live moves are held against is done less often.
    num_rounds, num_rounds_of_others = (1, 1) if quick else (9, 2)
    contexts = QUICK_CONTEXTS if quick else CONTEXTS
    short, long = contexts[0], contexts[-1]
    with tempfile.TemporaryDirectory() as folder:
        configs = {}
        for name, text in (("live", LIVE), ("stop", STOP_AND_COPY)):
            configs[name] = Path(folder) / f"{name}.yaml"
            configs[name].write_text(text, encoding="utf-8")
        with llumsched(2, (*ENGINE_FLAGS, "--config", str(configs["live"]))) as server:
            moves = Moves(server)
            live = asyncio.run(moves.alone(contexts, num_rounds))
            recompute_s = asyncio.run(moves.recompute(contexts, num_rounds_of_others))
            loaded, others = asyncio.run(moves.among_others(long, NUM_OTHERS, 1 if quick else 8))
            among_prompts = asyncio.run(
                moves.among_prompts(short, long, NUM_PROMPTS, 1 if quick else 6)
            )
            peak = asyncio.run(moves.watch_blocks(long, 1))
            staging = staging_num_bytes(server.pid)
        stop_and_copy = {}
        if not quick:
            with llumsched(2, (*ENGINE_FLAGS, "--config", str(configs["stop"]))) as server:
                stop_and_copy = asyncio.run(Moves(server).alone(contexts, num_rounds_of_others))
    return Measured(
        live=live,
        stop_and_copy=stop_and_copy,
        recompute_s=recompute_s,
        loaded=loaded,
        among_prompts=among_prompts,
        others=others,
        peak_reserved_blocks=peak,
        staging_num_bytes=staging,
    )


def _figures(measured: Measured, transports: dict[str, float]) -> list[Figure]:
    live, short, long = measured.live, measured.short, measured.long
    figures = [
        Figure(
            name=f"pause at {context} tokens, in decode steps",
            value=_median(m.pause_s / m.step_s for m in moves),
            unit="",
            at_most=1.25,
        )
        for context, moves in live.items()
    ]
    pause_s = {context: _median(m.pause_s for m in moves) for context, moves in live.items()}
    during = {side: measured.others[f"{side}, during"] for side in ("source", "destination")}
    before = {side: measured.others[f"{side}, before"] for side in ("source", "destination")}
    return [
        *figures,
        Figure(
            name=f"pause at {long} tokens over that at {short}",
            value=pause_s[long] / pause_s[short],
            unit="",
            at_most=1.15,
        ),
        Figure(
            name=f"decode step at {long} tokens over that at {short}, which the pause contains",
            value=_median(m.step_s for m in live[long]) / _median(m.step_s for m in live[short]),
            unit="",
        ),
        *_beyond_a_step(measured),
        Figure(
            name=f"whole pause at {long} tokens, recompute over live",
            value=_median(measured.recompute_s[long]) / pause_s[long],
            unit="",
            at_least=150,
        ),
        *(
            figure
            for context in (short, long)
            for figure in (
                Figure(
                    name=f"total time of a migration at {context} tokens",
                    value=_ms(m.total_s for m in live[context]),
                    unit="ms",
                ),
                Figure(
                    name=f"bytes of a migration at {context} tokens",
                    value=_median(m.num_bytes for m in live[context]) / 1e6,
                    unit="MB",
                ),
            )
        ),
        *(
            Figure(name=f"{transport}, {STAGE_NUM_BLOCKS} blocks", value=rate, unit="GB/s")
            for transport, rate in transports.items()
        ),
        Figure(
            name="shared memory, gather to scatter, over memcpy of the same bytes",
            value=transports["shared_memory"] / transports["memcpy"],
            unit="",
            at_least=0.5,
        ),
        *(
            Figure(
                name=f"other requests of the {side} while one migrates, median gap, ratio",
                value=_median(during[side]) / _median(before[side]),
                unit="",
                at_most=1.03,
            )
            for side in ("source", "destination")
        ),
        Figure(
            name="worst gap of the source's other requests over their median, while one migrates",
            value=max(during["source"]) / _median(during["source"]),
            unit="",
            at_most=1.3,
        ),
        Figure(
            name="worst gap of the source's other requests over their median, before",
            value=max(before["source"]) / _median(before["source"]),
            unit="",
        ),
        Figure(
            name=f"pause at {long} tokens to a loaded destination, in its decode steps",
            value=_median(m.pause_s / m.step_s for m in measured.loaded),
            unit="",
        ),
        Figure(
            name=f"pause to a destination computing {NUM_PROMPTS} prompts, in its steps",
            value=_median(m.pause_s / m.step_s for m in measured.among_prompts),
            unit="",
            at_most=1.25,
        ),
        Figure(
            name=f"step of a destination computing {NUM_PROMPTS} prompts",
            value=_ms(m.step_s for m in measured.among_prompts),
            unit="ms",
        ),
        Figure(
            name=f"blocks reserved at the destination at the peak, {long} tokens",
            value=measured.peak_reserved_blocks,
            unit="blocks",
        ),
        Figure(
            name="staging memory of both instances at the peak",
            value=measured.staging_num_bytes / 1e6,
            unit="MB",
        ),
    ]


def _beyond_a_step(measured: Measured) -> list[Figure]:
    if not measured.stop_and_copy:
        return []
    live_s, stopped_s = (
        [max(0.0, m.pause_s - m.step_s) for m in moves[measured.long]]
        for moves in (measured.live, measured.stop_and_copy)
    )
    beyond_s = _median(live_s)
    return [
        Figure(
            name=f"pause beyond one step at {measured.long} tokens, stop-and-copy over live",
            value=_median(stopped_s) / beyond_s if beyond_s else float("inf"),
            unit="",
            at_least=15,
        )
    ]


def _control(differing: dict[str, int]) -> list[Figure]:
    return [
        Figure(
            name=f"answers that differ alone and in a batch, never moved, {dtype}",
            value=count,
            unit=f"of {_batch_effects.NUM_ANSWERS}",
        )
        for dtype, count in differing.items()
    ]


def _tables(measured: Measured) -> list[Table]:
    return [
        Table(
            title="Pauses, medians in ms",
            columns=("context", "decode step", "live", "stop-and-copy", "recompute"),
            rows=[
                (
                    str(context),
                    _ms(m.step_s for m in moves),
                    _ms(m.pause_s for m in moves),
                    _ms(m.pause_s for m in measured.stop_and_copy[context])
                    if measured.stop_and_copy
                    else "",
                    _ms(measured.recompute_s[context]),
                )
                for context, moves in measured.live.items()
            ],
        ),
        Table(
            title="A live migration, medians",
            columns=(
                "context",
                "stages",
                "MB",
                "total, ms",
                "reported pause, ms",
                "worst pause, ms",
            ),
            rows=[
                (
                    str(context),
                    _median(m.num_stages for m in moves),
                    _median(m.num_bytes for m in moves) / 1e6,
                    _ms(m.total_s for m in moves),
                    _ms(m.suspended_s for m in moves),
                    1000 * max(m.pause_s for m in moves),
                )
                for context, moves in measured.live.items()
            ],
        ),
        Table(
            title=f"{NUM_OTHERS} other requests on each side, {measured.long} tokens moving,"
            " gaps in ms",
            columns=("where and when", "median", "p99", "worst", "number"),
            rows=[
                (name, _ms(gaps), 1000 * _p99(gaps), 1000 * max(gaps), str(len(gaps)))
                for name, gaps in measured.others.items()
            ],
        ),
    ]


def _draw(measured: Measured) -> None:
    def points(by_context: dict[int, list[float]]) -> plots.Points:
        return [(context, 1000 * _median(times)) for context, times in by_context.items()]

    def of(moves: dict[int, list[Move]], field: str) -> plots.Points:
        return points({c: [getattr(m, field) for m in found] for c, found in moves.items()})

    live, stopped = measured.live, measured.stop_and_copy
    series = {
        "pause": {
            "recompute": points(measured.recompute_s),
            "stop-and-copy": of(stopped, "pause_s"),
            "live": of(live, "pause_s"),
            "one decode step": of(live, "step_s"),
        },
        "total": {"stop-and-copy": of(stopped, "total_s"), "live": of(live, "total_s")},
    }
    DOCS.mkdir(parents=True, exist_ok=True)
    for name, title in PLOTS.items():
        title = f"{title} ({number(len(live[measured.long]))} moves each)"
        plot = plots.lines(title, "tokens of context", "ms", series[name])
        (DOCS / f"migration-{name}.svg").write_text(plot, encoding="utf-8")


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def _ms(values: Iterable[float]) -> float:
    return 1000 * _median(values)


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


if __name__ == "__main__":
    sys.exit(main(run))
