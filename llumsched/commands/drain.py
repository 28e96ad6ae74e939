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
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "instance_id", nargs="?", metavar="INSTANCE", help="as 'llumsched status' names it"
    )
    which.add_argument(
        "--node",
        metavar="ADDRESS",
        help="every instance on the machine of this address, as before it goes away",
    )
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
    """Drain one instance, or those of a machine."""
    client = AdminClient.of(args)
    drained = {args.instance_id} if args.node is None else _on(client, args.node)
    if not drained:
        print(f"no instance runs on {args.node}")
        return 0
    for instance_id in sorted(drained):
        client.drain(instance_id, deadline_s=args.deadline, replace=args.replace)
        print(f"{instance_id} takes no more requests", flush=True)
    if not args.no_wait:
        names = ", ".join(sorted(drained))
        await_that(
            client,
            lambda pool: not drained & {b["instance_id"] for b in pool["berths"]},
            args.timeout,
            f"the end of {names}",
        )
        print(f"{names} {'has' if len(drained) == 1 else 'have'} ended")
    return 0


def _on(client: AdminClient, node: str) -> set[str]:
    """The instances that run on a machine; what boots there is not one yet."""
    return {
        slot["instance_id"]
        for slot in client.instances()["berths"]
        if slot["node"] == node and slot["state"] == "running"
    }
