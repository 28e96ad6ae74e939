"""``llumsched restart``: replace every instance in turn, while the pool serves.

One at a time: the next is drained when the replacement of the one before takes requests. A pool of
one is made two for as long as it takes, so that there is always somewhere to move to.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from llumsched.commands import CommandError
from llumsched.commands._admin import AdminClient, add_server
from llumsched.commands._waiting import add_timeout, await_that, serving

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add this command's parser."""
    parser = subparsers.add_parser(
        "restart",
        help="replace every instance in turn while the pool serves",
        description=(
            "Drain every instance in turn and start another in its place. Running requests move to"
            " other instances; no request fails."
        ),
    )
    add_timeout(parser)
    add_server(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Restart the instances that serve now."""
    client = AdminClient.of(args)
    before = serving(client)
    if not before:
        raise CommandError("no instance is serving")
    alone = len(before) == 1
    if alone:
        client.scale(2)
        _await_serving(client, 2, args.timeout)
    for number, instance_id in enumerate(before, 1):
        print(f"[{number}/{len(before)}] draining {instance_id}", flush=True)
        client.drain(instance_id, replace=not alone)
        await_that(
            client,
            lambda pool, gone=instance_id: all(  # type: ignore[misc]
                b["instance_id"] != gone for b in pool["berths"]
            ),
            args.timeout,
            f"the end of {instance_id}",
        )
        _await_serving(client, len(before), args.timeout)
    print(f"serving: {', '.join(serving(client))}")
    return 0


def _await_serving(client: AdminClient, num_instances: int, timeout_s: float) -> None:
    await_that(
        client,
        lambda pool: sum(i["state"] == "serving" for i in pool["instances"]) >= num_instances,
        timeout_s,
        f"{num_instances} serving instances",
    )
