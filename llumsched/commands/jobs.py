"""``llumsched jobs``: what a running ``llumsched batch`` has to do at which times."""

from __future__ import annotations

import argparse
import urllib.parse
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llumsched.commands import CommandError
from llumsched.commands._admin import STATUS_TIMEOUT_S, AdminClient, add_server

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

URL = "http://127.0.0.1:8100"
ACTIONS = ("list", "history", "log", "pause", "resume", "run", "check")


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add this command's parser."""
    parser = subparsers.add_parser(
        "jobs",
        help="list scheduled jobs and their history; pause, resume, or run one now",
        description=(
            "Ask a running 'llumsched batch --jobs FILE' for its jobs. list: all jobs; history"
            " JOB: its runs; log RUN: what a run said; pause, resume, run JOB; check FILE: say"
            " what is wrong in a file of jobs, and when each is due next."
        ),
    )
    parser.add_argument("action", choices=ACTIONS, nargs="?", default="list")
    parser.add_argument("name", nargs="?", metavar="NAME", help="a job, a run, or a file")
    parser.add_argument(
        "--limit", type=int, default=20, metavar="N", help="runs of a history; default: %(default)s"
    )
    add_server(parser)
    parser.set_defaults(url=URL)
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what the action says."""
    if args.action == "list":
        _print_jobs(_call(args, "/llumsched/jobs")["jobs"])
        return 0
    if args.name is None:
        raise CommandError(f"say which: llumsched jobs {args.action} NAME")
    if args.action == "check":
        return _check(Path(args.name))
    name = urllib.parse.quote(args.name, safe="")
    if args.action == "history":
        for found in _call(args, f"/llumsched/jobs/{name}/runs?limit={args.limit}")["runs"]:
            shard = f"[{found['shard']}]" if found["shard"] else ""
            print(
                f"{_time(found['due_at'])}  {found['state']:<10}{found['run_id']}"
                f"  {found['cause']} {shard}".rstrip()
            )
    elif args.action == "log":
        for line in _call(args, f"/llumsched/runs/{name}")["log"]:
            print(f"{_time(line['at'])}  {line['message']}")
    elif args.action == "run":
        print("\n".join(_call(args, f"/llumsched/jobs/{name}/run", {})["run_ids"]))
    else:
        _call(args, f"/llumsched/jobs/{name}/{args.action}", {})
    return 0


def _call(args: argparse.Namespace, path: str, body: dict[str, Any] | None = None) -> Any:
    return AdminClient.of(args).call(path, timeout_s=STATUS_TIMEOUT_S, body=body)


def _print_jobs(jobs: list[dict[str, Any]]) -> None:
    if not jobs:
        print("no jobs")
    for job in jobs:
        last = job["last_run"]
        following = ", ".join(job["spec"]["after"])
        due = f"after {following}" if following else _time(job["next_due_at"])
        due = "paused" if job["is_paused"] else due
        said = "never run" if last is None else f"last {_time(last['due_at'])} {last['state']}"
        print(f"{job['name']:<24}{due:<28}{said}")


def _check(path: Path) -> int:
    import time

    from llumsched.jobs.spec import SpecError, load
    from llumsched.jobs.timing import next_due

    try:
        jobs = load(path)
    except SpecError as error:
        raise CommandError(str(error)) from error
    for name, job in sorted(jobs.items()):
        due = f"after {', '.join(job.after)}" if job.after else _time(next_due(job, time.time()))
        print(f"{name:<24}{due}")
    return 0


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "never again"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
