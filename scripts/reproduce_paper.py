"""Simulate what Llumnix (OSDI '24) published and write `docs/reproduction.md` with its charts.

    python -m scripts.reproduce_paper              # about a quarter of an hour on two cores
    python -m scripts.reproduce_paper --quick      # few requests, one seed: shows that it runs
    python -m scripts.reproduce_paper --report     # write the page again from the kept results

The systems are those of `configs/paper`, the experiments those of `scripts/reproduction`. Results
go to `docs/reproduction.json` as they come; a run that was interrupted goes on from there, and
`--afresh` begins anew: do that after any change to the simulator or a policy. `--quick` writes to
the folder `--out`, by default `build/reproduction`, and leaves `docs/` alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from llumsched.flags import Parser
from scripts.reproduction.experiments import JUDGED_FROM, Point, all_points
from scripts.reproduction.page import page
from scripts.reproduction.report import Report
from scripts.reproduction.runs import Results, run_all

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
QUICK_REQUESTS = 200
NUM_REQUESTS = 10_000


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate what is missing, and write the page."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests, one seed")
    parser.add_argument("--report", action="store_true", help="simulate nothing")
    parser.add_argument("--afresh", action="store_true", help="forget the kept results")
    parser.add_argument("--seeds", type=int, default=3, help="simulations a point; default: 3")
    parser.add_argument(
        "--judged-seeds", type=int, default=6, help="the same where ours is judged; default: 6"
    )
    parser.add_argument("--out", type=Path, help="folder of page, charts and results")
    arguments = parser.parse_args(argv)
    folder = arguments.out or (ROOT / "build" / "reproduction" if arguments.quick else DOCS)
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "reproduction.json"
    if arguments.afresh or arguments.quick:
        kept.unlink(missing_ok=True)
    results = Results(kept)
    num_seeds, num_judged = (1, 1) if arguments.quick else (arguments.seeds, arguments.judged_seeds)
    if not arguments.report:
        num_requests = QUICK_REQUESTS if arguments.quick else NUM_REQUESTS
        run_all(wanted(num_seeds, num_judged), results, num_requests=num_requests)
    write(folder, Report(results), num_seeds)
    print(f"written: {folder / 'reproduction.md'}")
    return 0


def wanted(num_seeds: int, num_judged: int) -> Iterator[tuple[Point, int]]:
    """Every point with each of its seeds."""
    for seed in range(num_seeds):
        yield from ((p, seed) for p in all_points() if p.figure != "judged")
    for seed in range(JUDGED_FROM, JUDGED_FROM + num_judged):
        yield from ((p, seed) for p in all_points() if p.figure == "judged")


def write(folder: Path, report: Report, num_seeds: int) -> None:
    """The page and its charts."""
    for name, svg in (("figure11", report.chart11()), ("threshold", report.chart15())):
        (folder / f"reproduction-{name}.svg").write_text(svg, encoding="utf-8")
    (folder / "reproduction.md").write_text(page(report, num_seeds=num_seeds), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
