"""``llumsched policies``: what is installed, with parameters, defaults and docs."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from llumsched import plugins
from llumsched.commands import CommandError
from llumsched.reference import text_of

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add this command's parser."""
    parser = subparsers.add_parser(
        "policies",
        help="list the scheduling policies that are installed, with their parameters",
        description=(
            "List the installed policies: bundles first, then the parts they are made of, each with"
            " its parameters and their defaults. A bundle or a dispatch policy is chosen with"
            " 'policy:' in a configuration file, a part with its kind under 'parts:'."
        ),
    )
    parser.add_argument(
        "name", nargs="*", help="only these (package.module:Class works too); default: all"
    )
    parser.add_argument(
        "--kind", choices=("bundle", *plugins.KINDS), help="only policies of one kind"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the policies; those that cannot be loaded are named at the end."""
    try:
        policies = [plugins.find(name) for name in args.name] or list(plugins.installed())
    except plugins.PluginError as error:
        raise CommandError(str(error)) from error
    kind = ""
    for policy in policies:
        if args.kind not in (None, policy.kind):
            continue
        if policy.kind != kind:
            kind = policy.kind
            print(f"{kind}\n{'=' * len(kind)}\n")
        print(text_of(policy) + "\n")
    broken = {} if args.name else plugins.broken()
    for problem in broken.values():
        print(f"cannot be loaded: {problem}", file=sys.stderr)
    return 1 if broken else 0
