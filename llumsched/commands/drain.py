"""``llumsched drain INSTANCE``: empty an instance, and end it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from llumsched.commands._admin import AdminClient, add_server
from llumsched.commands._waiting import add_timeout, await_that

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add this command's parser."""
    parser = subparsers.add_parser(
        "drain",
        help="empty an instance and end it; its requests go on elsewhere",
        description=(
            "Give an instance no new request, move those that run there to others, and end it when"
            " it is empty, or at its deadline: what is left then goes on elsewhere from the tokens"
            " it has, which costs computing them again. No client notices more than a pause."
        ),
    )
    parser.add_argument("instance_id", metavar="INSTANCE", help="as 'llumsched status' names it")
    parser.add_argument(
        "--deadline",
        type=float,
        metavar="SECONDS",
        help="end it after this long, empty or not; default: drain_timeout_s of the configuration",
    )
    parser.add_argument(
        "--replace", action="store_true", help="start another in its place when it has ended"
    )
    parser.add_argument("--no-wait", action="store_true", help="do not wait for its end")
    add_timeout(parser)
    add_server(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Drain one instance."""
    client = AdminClient.of(args)
    client.drain(args.instance_id, deadline_s=args.deadline, replace=args.replace)
    print(f"{args.instance_id} takes no more requests", flush=True)
    if not args.no_wait:
        await_that(
            client,
            lambda pool: all(b["instance_id"] != args.instance_id for b in pool["berths"]),
            args.timeout,
            f"the end of {args.instance_id}",
        )
        print(f"{args.instance_id} has ended")
    return 0
