"""Simulate every shipped policy on public traces and write `docs/comparison.md` with its charts.

    python -m scripts.compare_policies TRACES              # some half an hour on two cores
    python -m scripts.compare_policies TRACES --quick      # few requests: shows that it runs

TRACES is a folder with the public traces as `azure/AzureLLMInferenceTrace_conv.csv` and `_code.csv`
(Azure/AzurePublicDataset), `mooncake/conversation_trace.jsonl.gz` (kvcache-ai/Mooncake) and
`mooncake/mooncake_trace_1000.jsonl.gz` (the slice in ai-dynamo/dynamo). `--quick` writes to
`build/comparison` and leaves `docs/` alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from llumsched.flags import Parser
from scripts.comparison.page import Comparison
from scripts.comparison.runs import (
    DELAYS_S,
    POLICIES,
    WORKLOADS,
    Run,
    Workload,
    simulate_all,
    sustained_rate_rps,
)

ROOT = Path(__file__).parents[1]
QUICK_REQUESTS = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, and write the page."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, help="folder with the public traces")
    parser.add_argument("--quick", action="store_true", help="few requests, one seed")
    parser.add_argument("--seeds", type=int, default=3, help="simulations of each; default: 3")
    parser.add_argument("--out", type=Path, help="folder of the page and its charts")
    arguments = parser.parse_args(argv)
    missing = [w.path for w in WORKLOADS if not (arguments.traces / w.path).exists()]
    if missing:
        parser.error(f"{arguments.traces} lacks {', '.join(missing)}")
    folder = arguments.out or ROOT / ("build/comparison" if arguments.quick else "docs")
    folder.mkdir(parents=True, exist_ok=True)
    workloads: Sequence[Workload] = WORKLOADS
    if arguments.quick:
        workloads = tuple(replace(w, num_requests=QUICK_REQUESTS) for w in WORKLOADS)
    num_seeds = 1 if arguments.quick else arguments.seeds
    with ProcessPoolExecutor() as pool:
        found = pool.map(sustained_rate_rps, workloads, [arguments.traces] * len(workloads))
        rates = dict(zip(workloads, found, strict=True))
    print(*(f"{w.name}: {rate:g} requests/s" for w, rate in rates.items()), sep="\n", flush=True)
    compared = [
        Run(workload=workload, traces=arguments.traces, policy=policy, rate_rps=rates[workload],
            seed=seed)
        for workload in workloads
        for policy in POLICIES
        for seed in range(num_seeds)
    ]  # fmt: skip
    stale = [
        Run(workload=workloads[0], traces=arguments.traces, policy=policy,
            rate_rps=rates[workloads[0]], seed=seed, report_delay_s=delay_s)
        for delay_s in DELAYS_S
        for policy in POLICIES
        for seed in range(num_seeds)
    ]  # fmt: skip
    comparison = Comparison(compared, stale, simulate_all([*compared, *stale]))
    page = comparison.page(num_seeds=num_seeds)
    (folder / "comparison.md").write_text(page, encoding="utf-8")
    svg = comparison.staleness_chart()
    (folder / "comparison-staleness.svg").write_text(svg, encoding="utf-8")
    print(f"written: {folder / 'comparison.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
