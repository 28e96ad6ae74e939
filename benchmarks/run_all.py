"""Run the benchmarks and write what they measured into ``docs/``.

Each runs in a process of its own, one after another, so that none measures beside another or
inherits its memory. Its report is kept as ``docs/benchmarks/NAME.json``, and every page is written
from those files: ``docs/benchmarks.md`` lists all figures with their goals,
``docs/benchmarks/NAME.md`` has the tables behind them. A quick run shows that the benchmarks work
and leaves the docs alone. A missed goal is reported and changes nothing in the exit status; a
benchmark that fails to run does.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import _report
from llumsched.flags import Parser
from scripts.pages import number

FOLDER = Path(__file__).parent
DOCS = FOLDER.parent / "docs"
GRACE_S = 30.0
# What a reader of the page looks for first; the others follow by name.
FIRST = ("migration", "failures", "rolling_restart", "overload", "policies_on_engines", "peers")
GENERATED = "<!-- Written by `make bench`; change the benchmark, not this page. -->"


class Skipped(Exception):
    """A benchmark lacks what it needs, and has said what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A module of this folder that declares itself by a top-level ``BENCHMARK = "its title"``."""

    name: str
    title: str
    introduction: str


def discover(folder: Path) -> list[Benchmark]:
    """Every benchmark in ``folder``, by name. Files are read, not imported: some import vLLM."""
    found = []
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for statement in tree.body:
            match statement:
                case ast.Assign(
                    targets=[ast.Name(id="BENCHMARK")], value=ast.Constant(value=str(title))
                ):
                    introduction = ast.get_docstring(tree) or ""
                    found.append(Benchmark(name=path.stem, title=title, introduction=introduction))
    return found


def run(benchmark: Benchmark, *, quick: bool, timeout_s: float) -> dict[str, Any] | None:
    """The report of one benchmark, or ``None`` when it failed; its output is passed through.

    Raises ``Skipped`` when the benchmark says that it cannot run here.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", f"benchmarks.{benchmark.name}", "--json", str(report)]
        if quick:
            command.append("--quick")
        process = subprocess.Popen(command, cwd=FOLDER.parent)
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            print(f"{benchmark.name}: not done after {timeout_s:.0f} s", file=sys.stderr)
            _interrupt(process)
            return None
        if status == _report.SKIPPED:
            raise Skipped
        if status != 0:
            print(f"{benchmark.name}: exit status {status}", file=sys.stderr)
            return None
        content: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return content


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """Let a benchmark stop the servers it has started. Not by SIGINT: whoever runs in the
    background may be deaf to it."""
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def write_docs(benchmarks: Sequence[Benchmark], docs: Path) -> None:
    """Write every page from the reports that are kept beside the pages."""
    parts = [
        GENERATED,
        "# Benchmarks",
        (
            "`make bench` measures all of this again and rewrites it. On Linux, "
            "`sysctl kernel.sched_autogroup_enabled=0` first: with few cores, some of what is "
            "measured is else how long sessions wait for one another."
        ),
    ]
    places = {name: place for place, name in enumerate(FIRST)}
    for benchmark in sorted(benchmarks, key=lambda b: (places.get(b.name, len(FIRST)), b.name)):
        kept = docs / "benchmarks" / f"{benchmark.name}.json"
        if not kept.is_file():
            continue
        content = json.loads(kept.read_text(encoding="utf-8"))
        kept.with_suffix(".md").write_text(_page(benchmark, content), encoding="utf-8")
        parts += [
            f"## [{benchmark.title}](benchmarks/{benchmark.name}.md)",
            _report.figures_table(content["figures"]),
            f"Measured on: {content['machine']}.",
        ]
    (docs / "benchmarks.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _page(benchmark: Benchmark, content: dict[str, Any]) -> str:
    parts = [
        GENERATED,
        f"# {benchmark.title}",
        benchmark.introduction,
        f"Run it alone: `python -m benchmarks.{benchmark.name}`",
        _report.markdown(content),
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen benchmarks, or all; the exit status is 1 when one of them failed to run."""
    known = {benchmark.name: benchmark for benchmark in discover(FOLDER)}
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(known)}")
    parser.add_argument("--quick", action="store_true", help="few repetitions; docs are left alone")
    parser.add_argument(
        "--timeout-s", type=float, default=1800.0, help="for each benchmark (default: 1800)"
    )
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.names if name not in known]
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are: {', '.join(known)}")

    chosen = [known[name] for name in arguments.names or known]
    reports: dict[str, dict[str, Any]] = {}
    skipped: list[Benchmark] = []
    for position, benchmark in enumerate(chosen, start=1):
        print(f"\n=== {position}/{len(chosen)} {benchmark.title} ===", flush=True)
        started_s = time.monotonic()
        try:
            report = run(benchmark, quick=arguments.quick, timeout_s=arguments.timeout_s)
        except Skipped:
            skipped.append(benchmark)
            continue
        print(f"({time.monotonic() - started_s:.0f} s)", flush=True)
        if report is None:
            continue
        reports[benchmark.name] = report
        if not arguments.quick:
            folder = DOCS / "benchmarks"
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(report, indent=1) + "\n"
            (folder / f"{benchmark.name}.json").write_text(text, encoding="utf-8")
    if not arguments.quick:
        write_docs(list(known.values()), DOCS)
    if skipped:
        print(f"\nskipped: {', '.join(benchmark.name for benchmark in skipped)}")
    return _summarise([b for b in chosen if b not in skipped], reports)


def _summarise(chosen: Sequence[Benchmark], reports: dict[str, dict[str, Any]]) -> int:
    figures = [figure for report in reports.values() for figure in report["figures"]]
    with_goal = [figure for figure in figures if figure["holds"] is not None]
    missed = [figure for figure in with_goal if not figure["holds"]]
    failed = [benchmark.name for benchmark in chosen if benchmark.name not in reports]
    print(f"\n{len(with_goal) - len(missed)} of {len(with_goal)} goals met")
    for figure in missed:
        value = f"{number(figure['value'])} {figure['unit']}".rstrip()
        print(f"  missed: {figure['name']}: {value} (goal: {figure['goal']})")
    if failed:
        print(f"failed to run: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
