"""Simulate policies on nine kinds of public traffic and write `docs/comparison.md` with its chart.

    python -m scripts.compare_policies TRACES              # half an hour on two cores
    python -m scripts.compare_policies TRACES --keep build/kept    # may be cut short, and goes on
    python -m scripts.compare_policies TRACES --quick      # few requests: shows that it runs

TRACES is a folder with the public traces: `azure/AzureLLMInferenceTrace_conv.csv` and `_code.csv`
(Azure/AzurePublicDataset), `mooncake/conversation_trace.jsonl.gz` (kvcache-ai/Mooncake) and
`mooncake/mooncake_trace_1000.jsonl.gz` (the slice in ai-dynamo/dynamo),
`servegen/reason_deepseek-r1.tar.gz` (the deepseek-r1 clients of alibaba/ServeGen) and
`lengths/etalon_bwb_stats_llama2_tokenizer_filtered_v2.csv.gz` (project-etalon/etalon). `--quick`
writes to `build/comparison` and leaves `docs/` alone.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from scripts.comparison.page import Comparison
from scripts.comparison.runs import (
    DELAYS_S,
    LARGER_POLICIES,
    POLICIES,
    RATED_INSTANCES,
    Run,
    simulate_all,
    sustained_rate_rps,
)
from scripts.comparison.workloads import WORKLOADS, Workload, shortened

ROOT = Path(__file__).parents[1]
QUICK_REQUESTS = 60
STALE_LOAD = 0.95
STALE_POLICIES = ("adaptive", "late_binding", "dynamo")


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", type=Path, help="folder with the public traces")
    parser.add_argument("--quick", action="store_true", help="few requests, one seed, one load")
    parser.add_argument("--seeds", type=int, default=3, help="simulations of each; default: 3")
    parser.add_argument(
        "--loads", type=_floats, default=(0.9, 1.0), help="shares of capacity offered"
    )
    parser.add_argument(
        "--instances",
        type=_ints,
        default=(8, 16),
        help="sizes of the pool; one larger than 8 is simulated at the greatest load, with fewer"
        " policies; default: 8,16",
    )
    parser.add_argument(
        "--rates-of",
        type=Path,
        metavar="PAGE",
        help="take each capacity from a page of an earlier run, which is most of the work, instead"
        " of finding it",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder where finished simulations are kept: the next run with it goes on from there",
    )
    parser.add_argument("--processes", type=int, default=2, help="simulations at a time")
    parser.add_argument("--out", type=Path, help="folder of the page and its charts")
    arguments = parser.parse_args(argv)
    missing = sorted(
        {w.source for w in WORKLOADS if w.is_file and not (arguments.traces / w.source).exists()}
    )
    if missing:
        parser.error(f"{arguments.traces} lacks {', '.join(missing)}")
    folder = arguments.out or ROOT / ("build/comparison" if arguments.quick else "docs")
    folder.mkdir(parents=True, exist_ok=True)
    workloads: Sequence[Workload] = WORKLOADS
    loads, sizes, num_seeds = arguments.loads, arguments.instances, arguments.seeds
    if arguments.quick:
        workloads = tuple(shortened(w, QUICK_REQUESTS) for w in WORKLOADS)
        loads, sizes, num_seeds = (1.0,), (8,), 1
    if arguments.rates_of is not None:
        rates = rates_of(arguments.rates_of.read_text(encoding="utf-8"), workloads)
    else:
        with ProcessPoolExecutor(arguments.processes) as pool:
            num = len(workloads)
            found = pool.map(
                sustained_rate_rps, workloads, [arguments.traces] * num, [arguments.keep] * num
            )
            rates = dict(zip(workloads, found, strict=True))
    print(*(f"{w.name}: {rate:g} requests/s" for w, rate in rates.items()), sep="\n", flush=True)
    compared = [
        Run(workload=workload, traces=arguments.traces, policy=policy, load=load, seed=seed,
            num_instances=num_instances, capacity_rps=rates[workload])
        for workload in workloads
        for num_instances, load, policies in [
            *((size, load, POLICIES) for size in sizes for load in loads if not _is_larger(size)),
            *((size, max(loads), LARGER_POLICIES) for size in sizes if _is_larger(size)),
        ]
        for policy in policies
        for seed in range(1, num_seeds + 1)
    ]  # fmt: skip
    stale = [
        Run(workload=workloads[0], traces=arguments.traces, policy=policy, load=STALE_LOAD,
            capacity_rps=rates[workloads[0]], seed=seed, report_delay_s=delay_s)
        for delay_s in DELAYS_S
        for policy in STALE_POLICIES
        for seed in (1,)
    ]  # fmt: skip
    summaries = simulate_all([*compared, *stale], arguments.processes, arguments.keep)
    comparison = Comparison(compared, stale, summaries)
    page = comparison.page(num_seeds=num_seeds)
    (folder / "comparison.md").write_text(page, encoding="utf-8")
    svg = comparison.staleness_chart()
    (folder / "comparison-staleness.svg").write_text(svg, encoding="utf-8")
    print(f"written: {folder / 'comparison.md'}")
    return 0


def _is_larger(num_instances: int) -> bool:
    return num_instances > RATED_INSTANCES


def rates_of(page: str, workloads: Sequence[Workload]) -> dict[Workload, float]:
    """The capacities that a page names.

    Raises:
        SystemExit: it lacks one of the workloads.
    """
    rates = {}
    for workload in workloads:
        pattern = rf"^## {re.escape(workload.name.capitalize())}$.*?capacity ([\d.]+) requests/s"
        found = re.search(pattern, page, flags=re.DOTALL | re.MULTILINE)
        if found is None:
            raise SystemExit(
                f"the page names no capacity for {workload.name}: leave --rates-of out"
            )
        rates[workload] = float(found.group(1))
    return rates


def _floats(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def _ints(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    sys.exit(main())
