"""The default policy beside three others, on two real engines that are short of memory.

Each policy serves the same requests on two instances of its own, one policy after another, the
order turned by one from seed to seed. `adaptive` stands beside the old `latency`, the plain router
`infaas` and itself without migration, for four shapes of traffic: bursts of which a quarter of the
answers is long, long prompts among short ones, conversations of four turns, and urgent requests
among others. A load is a share of what the first policy serves a second while all requests of the
shape wait at once.

A ratio is one of the same seed, below 1 where `adaptive` is better; the table has the median of the
seeds, with the least and the largest. All of it takes hours: `--shapes`, `--loads`, `--seeds` and
`--requests` choose a part, and the notes say which.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks._contest import contest, options, plan_of, pool_contestant
from benchmarks._contest_report import NO_WORSE_THAN, notes, ratio_figures, ratio_tables
from benchmarks._report import Report, main_with_flags
from benchmarks._shapes import SHAPES

BENCHMARK = "Policies on real engines"

OURS = "adaptive"
POLICIES = {
    OURS: "policy: adaptive\n",
    "adaptive without migration": "policy: adaptive\nparts: {migration: none}\n",
    "infaas": "policy: infaas\n",
    "latency": "policy: latency\n",
}
LOADS = (0.6, 0.8, 0.95)


def run(arguments: argparse.Namespace) -> Report:
    plan = plan_of(arguments)
    outcome = contest(plan, [pool_contestant(name, text) for name, text in POLICIES.items()])
    return Report(
        figures=ratio_figures(outcome, OURS, at_most=NO_WORSE_THAN),
        tables=ratio_tables(outcome, OURS),
        notes=notes(outcome),
    )


if __name__ == "__main__":
    sys.exit(main_with_flags(run, options(list(SHAPES), LOADS)))
