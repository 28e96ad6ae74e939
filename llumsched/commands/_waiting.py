"""Waiting until a running server has done what it was asked."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

from llumsched.commands import CommandError
from llumsched.commands._admin import AdminClient

POLL_INTERVAL_S = 0.5
DEFAULT_TIMEOUT_S = 1200.0


def add_timeout(parser: argparse.ArgumentParser) -> None:
    """The option that says how long to wait."""
    parser.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        metavar="SECONDS",
        help="how long to wait for each instance; default: %(default)g",
    )


def running(client: AdminClient) -> list[str]:
    """The instances that run, by id."""
    berths = client.instances()["berths"]
    return sorted(b["instance_id"] for b in berths if b["state"] == "running")


def serving(client: AdminClient) -> list[str]:
    """The instances that take requests, by id."""
    instances = client.instances()["instances"]
    return sorted(i["instance_id"] for i in instances if i["state"] == "serving")


def await_that(
    client: AdminClient, holds: Callable[[Mapping[str, Any]], bool], timeout_s: float, what: str
) -> None:
    """Wait until ``holds`` of the server's instances.

    Raises:
        CommandError: if it does not within ``timeout_s``; says ``what`` was waited for.
    """
    deadline_s = time.monotonic() + timeout_s
    while not holds(client.instances()):
        if time.monotonic() > deadline_s:
            raise CommandError(f"not within {timeout_s:g} s: {what}")
        time.sleep(POLL_INTERVAL_S)
