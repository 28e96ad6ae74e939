"""Reports and exit status of ``simulate`` and ``sweep`` where a policy failed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llumsched.policy_failures import Failure, tracebacks


def add_failures(parser: argparse.ArgumentParser) -> None:
    """The option that a run whose policy fails is a good run."""
    parser.add_argument(
        "--allow-policy-failures",
        action="store_true",
        help="exit with 0 though a policy raised or answered nonsense",
    )


def status_of_failures(args: argparse.Namespace, failures: Sequence[Failure]) -> int:
    """The exit status; the tracebacks are printed, each once."""
    for text in tracebacks(failures):
        print(f"\n{text}", file=sys.stderr)
    if not failures or args.allow_policy_failures:
        return 0
    count = sum(failure.count for failure in failures)
    print(
        f"\nllumsched: {count:,} decisions were not the policy's own, since it failed: the figures"
        " under its name are not its figures (--allow-policy-failures: exit with 0)",
        file=sys.stderr,
    )
    return 1
