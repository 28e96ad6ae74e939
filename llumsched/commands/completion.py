"""``llumsched completion SHELL``: what makes a shell complete commands and options."""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING

from llumsched.commands import CommandError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

SHELLS = ("bash", "zsh", "tcsh")


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add this command's parser."""
    parser = subparsers.add_parser(
        "completion",
        help="print what makes a shell complete commands and options",
        description=(
            "Print a script for a shell. In ~/.bashrc:"
            " eval \"$(llumsched completion bash)\". The flags of 'serve' are vLLM's, which take"
            " seconds to find out, and are not completed."
        ),
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    shtab = importlib.import_module("shtab")
    from llumsched.cli import whole_parser

    try:
        print(shtab.complete(whole_parser(), shell=args.shell))
    except NotImplementedError as error:
        raise CommandError(f"shtab has no completion for {args.shell}") from error
    return 0
