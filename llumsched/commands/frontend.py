"""``llumsched frontend --join ADDRESS``: one more frontend of a pool that runs."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import traceback
from typing import TYPE_CHECKING

from llumsched import __version__, logs
from llumsched.commands import CommandError
from llumsched.commands._vllm import ALLOW_OTHER_VLLM, refuses_vllm

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

logger = logging.getLogger(__name__)


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add this command's parser."""
    parser = subparsers.add_parser(
        "frontend",
        help="add an HTTP frontend to a running server, on any machine of its Ray cluster",
        description=(
            "Serve the model of a running 'llumsched serve' by one more HTTP frontend, on any"
            " machine of its Ray cluster: with the server's API keys, routes, limits and scheduler,"
            " at a host and port of its own. It may come and go at any time, and ends with the"
            " server."
        ),
    )
    parser.add_argument(
        "--join",
        required=True,
        type=ray_address,
        metavar="ADDRESS",
        help="HOST:PORT of the Ray cluster in which the server runs, or 'auto' for the one that"
        " this machine is part of",
    )
    parser.add_argument(
        "--pool",
        metavar="PID",
        help="the server's process, if several run in the cluster; default: the only one",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument(
        ALLOW_OTHER_VLLM,
        action="store_true",
        help="as for 'llumsched serve', where the server was started with it",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    argv = [ALLOW_OTHER_VLLM] if args.allow_other_vllm else []
    if refuses_vllm("frontend", argv):
        return 2
    logs.set_up("llumsched", logs.LogOptions())
    logger.info("llumsched %s: finding the server, then importing vLLM", __version__)
    logs.prepare_ray()
    from llumsched.engine.vllm.compat import installed_version
    from llumsched.pool.joining import invited, take_environment
    from llumsched.pool.ray_cluster import LaunchError

    try:
        invitation, here = invited(args.join, args.pool, installed_version())
    except LaunchError as error:
        raise CommandError(str(error)) from error
    take_environment(invitation, os.environ)
    from llumsched.frontend import join

    try:
        status = join.main(invitation, here, args.host, args.port)
    except Exception:
        traceback.print_exc()
        status = 1
    # As for the server: the finalizers of vLLM's libraries take seconds, or wait for ever.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def ray_address(text: str) -> str:
    """The address of a Ray cluster; a type of ``argparse``.

    Raises:
        ArgumentTypeError: if it is none.
    """
    if text != "auto" and not re.fullmatch(r"[^/\s]+:\d+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no address of a Ray cluster: give HOST:PORT, as 'ray start' names it, or"
            " 'auto'"
        )
    return text
