"""``llumsched migrate``: move a running request, or an idle session, and say what it took."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llumsched.commands._admin import AdminClient, add_server
from llumsched.logs import counted

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add this command's parser."""
    parser = subparsers.add_parser(
        "migrate",
        help="move a running request, or an idle session, to another instance",
        description=(
            "Move a running request to another instance while it streams. Its client sees the same"
            " tokens. A request that cannot move now stays where it is, and the reason is printed."
            " Of a session that has no running request, what is cached of its last one moves, for"
            " its next."
        ),
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "request_id",
        metavar="REQUEST_ID",
        nargs="?",
        help="as 'llumsched status' or the response names it",
    )
    what.add_argument(
        "--session",
        metavar="ID",
        dest="session_id",
        help="instead of a request: a session, as its requests name it",
    )
    parser.add_argument(
        "--to",
        metavar="INSTANCE",
        dest="destination",
        help="the instance to move it to; default: the one with the most room",
    )
    add_server(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Move one request, or one session."""
    report = AdminClient.of(args).migrate(args.request_id, args.destination, args.session_id)
    print("\n".join(report_lines(report)))
    return 0


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """How a migration went, in three lines; two of an idle session, which nobody waits for."""
    if report.get("has_ended"):
        moved = (
            f"moved the KV of {report['request_id']}, which has ended, from {report['source']} to"
            f" {report['destination']} in {1000 * report['total_s']:.0f} ms"
        )
        return [moved, copied(report)]
    moved = (
        f"moved {report['request_id']} from {report['source']} to {report['destination']}"
        f" after {report['num_output_tokens']} tokens of output"
    )
    paused = (
        f"suspended for {1000 * report['suspended_s']:.0f} ms, where one decode step takes"
        f" {1000 * report['step_time_s']:.0f} ms; {1000 * report['total_s']:.0f} ms in all"
    )
    return [moved, copied(report), paused]


def copied(report: Mapping[str, Any]) -> str:
    """Sentence on the part of a request's context that was copied, and how."""
    cached = report["num_cached_blocks"]
    return (
        f"context of {report['num_tokens']} tokens: {counted(report['num_blocks'], 'KV block')}"
        f" ({report['num_bytes'] / 1e6:.1f} MB) copied in {counted(report['num_stages'], 'stage')}"
        f" by {report['transport'].replace('_', ' ')}"
        + (f", {cached} already there" if cached else "")
    )
