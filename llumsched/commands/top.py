"""``llumsched top``: a running server in the terminal, as the live page has it."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import TYPE_CHECKING

from llumsched.commands import CommandError
from llumsched.commands._admin import AdminClient, add_server

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add this command's parser."""
    parser = subparsers.add_parser(
        "top",
        help="watch a running server in the terminal: instances, requests, migrations",
        description=(
            "Show instances, requests and migrations as they happen, from the same stream as the"
            " live page. Keys: s sorts by the next column, r reverses, d drains the instance and m"
            " moves the request under the cursor, q ends."
        ),
    )
    add_server(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Show it until q or Ctrl-C."""
    client = AdminClient.of(args)
    # Said as any other command says it, before the screen is taken over.
    next(client.live())
    if not sys.stdout.isatty():
        raise CommandError("'top' needs a terminal; 'llumsched status --watch' does not")
    app = importlib.import_module("llumsched.commands._top_app").TopApp(client)
    app.run()
    return 0
