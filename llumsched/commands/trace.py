"""``llumsched trace REQUEST``: what became of one request, step by step, and why."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llumsched.commands._admin import AdminClient, add_server
from llumsched.logs import counted

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add this command's parser."""
    parser = subparsers.add_parser(
        "trace",
        help="show what became of a request: queue, dispatch, migrations, resumptions",
        description=(
            "Show the steps of one request, running or among the last two thousand: when it arrived"
            " and was held, where it was sent, why, and how the instances were then; each migration"
            " with its stages, bytes and pause; each time that its instance was lost. For older"
            " ones start the server with --decision-log and see 'llumsched replay --request'."
        ),
    )
    parser.add_argument(
        "request_id", metavar="REQUEST", help="the id in the response, or that 'status' shows"
    )
    add_server(parser)
    parser.add_argument("--json", action="store_true", help="print what the admin API answers")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the steps of the request, or of each of its sequences."""
    found = AdminClient.of(args).trace(args.request_id)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    for number, (request_id, steps) in enumerate(sorted(found["requests"].items())):
        if number:
            print()
        print(request_id)
        print("\n".join(lines_of(steps)))
    return 0


def lines_of(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """The steps in words: the time of day of the first, and how long after it the others came."""
    lines = []
    first_s = steps[0]["at_s"] if steps else 0.0
    for step in steps:
        since_s = step["at_s"] - first_s
        when = f"+{since_s:9.3f} s" if since_s else time.strftime("%H:%M:%S", _local(first_s))
        where = f" {step['instance_id']}" if step["instance_id"] else ""
        which = f" {step['migration_id']}" if step["migration_id"] else ""
        text = f": {step['text']}" if step["text"] else ""
        lines.append(f"  {when:>12}  {step['kind']}{which}{where}{text}")
        lines += [
            f"{'':16}{candidate['instance_id']}: {candidate['num_free_blocks']} of"
            f" {candidate['num_total_blocks']} blocks free, {candidate['num_running']} running,"
            f" {candidate['num_waiting']} waiting{_score(candidate, step)}"
            for candidate in step["candidates"]
        ]
        lines += [
            f"{'':16}stage {number}: {counted(stage['num_blocks'], 'block')},"
            f" {1000 * stage['took_s']:.0f} ms"
            for number, stage in enumerate((step.get("statistics") or {}).get("stages", ()), 1)
        ]
    return lines


def _score(candidate: Mapping[str, Any], step: Mapping[str, Any]) -> str:
    score = candidate.get("score")
    return "" if score is None else f"; {step['scored_by']}: {score:.4g}"


def _local(seconds: float) -> time.struct_time:
    return time.localtime(seconds)
