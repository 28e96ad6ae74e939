"""``llumsched scale N``: have N instances."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from llumsched.commands._admin import AdminClient, add_server
from llumsched.commands._waiting import add_timeout, await_that, running

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add this command's parser."""
    parser = subparsers.add_parser(
        "scale",
        help="start or drain instances until there are N",
        description=(
            "Start instances, or drain those with the fewest requests, until there are N. With"
            " automatic scaling (max_instances in the configuration) the policy goes on from there."
        ),
    )
    parser.add_argument("num_instances", metavar="N", type=int, help="how many instances")
    parser.add_argument("--no-wait", action="store_true", help="do not wait until there are")
    add_timeout(parser)
    add_server(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Scale the pool."""
    client = AdminClient.of(args)
    client.scale(args.num_instances)
    if not args.no_wait:
        await_that(
            client,
            lambda pool: (
                sum(b["state"] == "running" for b in pool["berths"]) == args.num_instances
                and len(pool["berths"]) == args.num_instances
            ),
            args.timeout,
            f"{args.num_instances} instances",
        )
        print(f"running: {', '.join(running(client)) or 'none'}")
    return 0
