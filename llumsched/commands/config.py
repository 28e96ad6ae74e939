"""``llumsched config``: check a configuration file, or print the whole configuration in force."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llumsched.commands import CommandError
from llumsched.config import DEFAULT_POLICY, Config, ConfigError, load
from llumsched.plugins import PluginError
from llumsched.reference import yaml_of

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add this command's parser."""
    parser = subparsers.add_parser(
        "config",
        help="check a configuration file, or print the whole configuration in force",
        description="Work with configuration files of the scheduler.",
    )
    commands = parser.add_subparsers(dest="config_command", metavar="COMMAND", required=True)
    check = commands.add_parser(
        "check", help="say whether files are right, or what is wrong in each of their sections"
    )
    check.add_argument("files", type=Path, nargs="+", metavar="FILE")
    show = commands.add_parser(
        "show", help="print every key with its value in force, its range and what it does"
    )
    source = show.add_mutually_exclusive_group()
    source.add_argument("file", type=Path, nargs="?", metavar="FILE", help="a configuration file")
    source.add_argument(
        "--policy", default=DEFAULT_POLICY, metavar="NAME", help="a bundle as it ships"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Check or show; a mistake in a file is a ``CommandError`` with its line."""
    if args.config_command == "check":
        return _check(args.files)
    try:
        config = load(args.file) if args.file is not None else Config.default(args.policy)
        print(yaml_of(config), end="")
    except (ConfigError, PluginError) as error:
        raise CommandError(str(error)) from error
    return 0


def _check(files: Sequence[Path]) -> int:
    """A line a file that is right, and one a mistake; the exit status is 1 if there is any."""
    status = 0
    for file in files:
        try:
            config = load(file)
        except ConfigError as error:
            print(f"llumsched config: {error}", file=sys.stderr)
            status = 1
        else:
            print(f"{file}: ok, policy {config.policy!r}")
    return status
