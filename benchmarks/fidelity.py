"""How close the simulator is to measured runs of vLLM.

    python -m benchmarks.fidelity DATA

The runs are public: vLLM 0.19.0 serving 300 ShareGPT requests at 10.3 requests/s, recorded per
request by the authors of LLMServingSim, on an RTX 4090 (saturated, preempting all the time) and on
an RTX PRO 6000. The simulated engine gets the arrivals, lengths and shared prefixes of the run, the
block count that vLLM printed (of the RTX PRO 6000 there is none; its cache never fills), and the
operator profile of the same card
(`configs/hardware/*-llama-3.1-8b.yaml`). Besides, fixed-length points of Qwen3-32B under vLLM
0.12.0 on 2 to 8 H100s from aiconfigurator's silicon sample, simulated with steps fitted to its
operator tables. Nothing is fitted to the runs or the points.

DATA (or `LLUMSCHED_DATA`) is a folder with `bench/examples/` of casys-kaist/LLMServingSim as
`traces/measured/llmservingsim/<GPU>/Llama-3.1-8B/requests.jsonl.gz`, and its prompts, reduced to
lengths and block hashes, as `sharegpt-llama-3.1-8b-300-sps10.mooncake16.jsonl.gz` beside them;
for the points `traces/measured/aiconfigurator_silicon_sample.csv.gz` of ai-dynamo/aiconfigurator
and the folder `profiles` that `scripts/fit_hardware.py` takes.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _report, _silicon
from benchmarks._report import Figure, Report, Table
from llumsched.config import Config
from llumsched.simulator.hardware.spec import load_hardware
from llumsched.simulator.options import SimulationOptions
from llumsched.simulator.results.metrics import Distribution, latencies
from llumsched.simulator.simulation import simulate
from llumsched.simulator.traces.loaders import load_trace
from llumsched.simulator.traces.trace import Floats, Trace

BENCHMARK = "The simulator beside measured runs"

RUNS_FOLDER = Path("traces") / "measured" / "llmservingsim"
PROMPTS = "sharegpt-llama-3.1-8b-300-sps10.mooncake16.jsonl.gz"

# Goals in percent of the measured value.
MEAN_GOAL = 5.0
P99_GOAL = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """A run: where it is, the engine's options, and whether its figures have goals."""

    gpu: str
    hardware: str
    max_num_seqs: int
    has_goals: bool


RUNS = (
    MeasuredRun(gpu="RTX4090", hardware="rtx4090-llama-3.1-8b", max_num_seqs=256, has_goals=True),
    MeasuredRun(
        gpu="RTXPRO6000", hardware="rtxpro6000-llama-3.1-8b", max_num_seqs=128, has_goals=False
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of each request of a run, measured or simulated."""

    ttft_s: Floats
    tpot_s: Floats
    e2e_s: Floats
    makespan_s: float

    def distributions(self) -> dict[str, Distribution]:
        """By the name that tables use."""
        return {
            "TTFT": Distribution.of(self.ttft_s),
            "TPOT": Distribution.of(self.tpot_s),
            "E2E": Distribution.of(self.e2e_s),
        }


def measured(folder: Path, prompts: Path) -> tuple[Trace, Times]:
    """The traffic of a run as it reached the engine, and what the engine took."""
    with gzip.open(folder / "requests.jsonl.gz", "rt", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = [json.loads(line) for line in file]
    trace = load_trace(prompts, format="mooncake", hash_block_size=16)
    columns = {
        name: np.array([row[name] for row in rows], dtype=np.float64)
        for name in ("queued_ts", "first_token_ts", "last_token_ts", "output_toks", "input_toks")
    }
    if not np.array_equal(columns["input_toks"], trace.num_prompt_tokens):
        raise ValueError(f"{folder}: its requests are not those of {prompts}")
    queued = columns["queued_ts"]
    trace = dataclasses.replace(
        trace,
        arrival_s=queued - queued.min(),
        num_output_tokens=columns["output_toks"].astype(np.int64),
    )
    decode = columns["last_token_ts"] - columns["first_token_ts"]
    times = Times(
        ttft_s=columns["first_token_ts"] - queued,
        tpot_s=decode / (columns["output_toks"] - 1),
        e2e_s=columns["last_token_ts"] - queued,
        makespan_s=float(columns["last_token_ts"].max() - queued.min()),
    )
    return trace, times


def simulated(run: MeasuredRun, trace: Trace) -> tuple[Times, int]:
    """The same traffic on one simulated instance; and how often it preempted."""
    options = SimulationOptions(
        hardware=load_hardware(run.hardware),
        num_instances=1,
        engine="vllm-v1",
        config=Config.default("round_robin"),
        max_num_seqs=run.max_num_seqs,
        max_num_batched_tokens=2048,
    )
    result = simulate(trace, options)
    found = latencies(result)
    times = Times(
        ttft_s=found.ttft_s,
        tpot_s=found.tpot_s,
        e2e_s=found.e2e_s,
        makespan_s=result.makespan_s,
    )
    return times, int(result.num_preemptions.sum())


def compare(run: MeasuredRun, data: Path) -> tuple[list[Figure], Table, str]:
    """Errors in percent, the figures behind them, and a note."""
    folder = data / RUNS_FOLDER
    trace, real = measured(folder / run.gpu / "Llama-3.1-8B", folder / PROMPTS)
    ours, num_preemptions = simulated(run, trace)
    figures, rows = [], []
    for name, was in real.distributions().items():
        found = ours.distributions()[name]
        for which, goal in (("mean", MEAN_GOAL), ("p50", None), ("p90", None), ("p99", P99_GOAL)):
            a, b = getattr(was, which), getattr(found, which)
            error = 100 * (b / a - 1)
            rows.append((f"{name} {which}", f"{a:.4g} s", f"{b:.4g} s", f"{error:+.1f} %"))
            if goal is not None:
                figures.append(
                    Figure(
                        name=f"{run.gpu}: {name} {which}, off by",
                        value=abs(error),
                        unit="%",
                        at_most=goal if run.has_goals else None,
                    )
                )
    error = 100 * (ours.makespan_s / real.makespan_s - 1)
    rows.append(
        ("makespan", f"{real.makespan_s:.4g} s", f"{ours.makespan_s:.4g} s", f"{error:+.1f} %")
    )
    table = Table(
        title=f"{run.gpu}, Llama-3.1-8B",
        columns=("", "measured", "simulated", "difference"),
        rows=rows,
    )
    return figures, table, f"{run.gpu}: the simulated engine preempted {num_preemptions} times."


def compare_points(data: Path) -> tuple[list[Figure], list[Table], list[str]]:
    """Mean errors of the fixed-length points in percent, every point, and notes."""
    if not ((data / _silicon.POINTS).is_file() and (data / _silicon.PROFILES).is_dir()):
        return [], [], ["The fixed-length points, or their profiles, are not in DATA."]
    found, notes = _silicon.compared(data)
    rows = []
    errors: dict[str, list[float]] = {"TTFT": [], "TPOT": []}
    for point, ttft_s, tpot_s in found:
        ttft, tpot = 100 * (ttft_s / point.ttft_s - 1), 100 * (tpot_s / point.tpot_s - 1)
        errors["TTFT"].append(ttft)
        errors["TPOT"].append(tpot)
        rows.append(
            (
                str(point.num_gpus),
                f"{point.num_prompt_tokens} / {point.num_output_tokens}",
                str(point.concurrency),
                f"{1e3 * point.ttft_s:.0f} ms",
                f"{1e3 * ttft_s:.0f} ms",
                f"{ttft:+.0f} %",
                f"{1e3 * point.tpot_s:.1f} ms",
                f"{1e3 * tpot_s:.1f} ms",
                f"{tpot:+.0f} %",
            )
        )
    figures = [
        Figure(
            name=f"H100, Qwen3-32B, {len(rows)} fixed-length points: {name}, {what}",
            value=float(value),
            unit="%",
        )
        for name, values in errors.items()
        for what, value in (
            ("mean error", np.mean(values)),
            ("mean absolute error", np.mean(np.abs(values))),
        )
    ]
    table = Table(
        title="H100, Qwen3-32B, fixed lengths",
        columns=(
            "GPUs",
            "prompt / output",
            "clients",
            "TTFT measured",
            "simulated",
            "difference",
            "TPOT measured",
            "simulated",
            "difference",
        ),
        rows=rows,
    )
    notes.append(
        "The fixed-length points are simulated from kernel times alone: no time of the host, which"
        " a server of vLLM 0.12 adds to a step; prompts in chunks of"
        f" {_silicon.MAX_BATCHED_TOKENS:,} tokens, vLLM's default on this card, continue the table"
        " beyond its last point. The clients of a point begin evenly spread over the time of one"
        " request, which was decided after a first comparison, in which they stayed in step."
    )
    return figures, [table], notes


def main(argv: Sequence[str] | None = None) -> int:
    """Compare every run, or say what is missing."""
    options = list(sys.argv[1:] if argv is None else argv)
    given = options.pop(0) if options and not options[0].startswith("-") else None
    data = Path(given or os.environ.get("LLUMSCHED_DATA", ""))
    if not (data / RUNS_FOLDER).is_dir() and not {"-h", "--help"} & set(options):
        print(
            f"skipped: it needs the public runs, in DATA/{RUNS_FOLDER};"
            " `python -m benchmarks.fidelity --help` says which",
            file=sys.stderr,
        )
        return _report.SKIPPED

    def run(_quick: bool) -> Report:
        compared = [compare(run, data) for run in RUNS]
        figures, tables, notes = compare_points(data)
        return Report(
            figures=[*(figure for figures, _, _ in compared for figure in figures), *figures],
            tables=[*(table for _, table, _ in compared), *tables],
            notes=[*(note for _, _, note in compared), *notes],
        )

    return _report.main(run, options)


if __name__ == "__main__":
    sys.exit(main())
