"""Names of policies in tables and files: short where that is enough, and never the same for two.

A policy that is installed is named as it is, a configuration file by its stem. Where two would be
called alike, files take more of their path, until every name, and every file name made of it, is
one policy's alone. This module does not know what a policy does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def is_file(policy: str) -> bool:
    """True if a policy is named by a configuration file."""
    return Path(policy).suffix in (".yaml", ".yml")


def labels(policies: Sequence[str]) -> list[str]:
    """A label for each policy, all different.

    Raises:
        ValueError: the same policy, or the same file, is named twice.
    """
    seen: dict[str, str] = {}
    for policy in policies:
        identity = str(Path(policy).resolve()) if is_file(policy) else policy
        if identity in seen:
            other = seen[identity]
            which = f"{policy!r}" if other == policy else f"{other!r} and {policy!r}, one file,"
            raise ValueError(f"names {which} twice: each policy once")
        seen[identity] = policy
    lengths = [0] * len(policies)
    while True:
        named = [_label(policy, length) for policy, length in zip(policies, lengths, strict=True)]
        in_files = [file_name(label) for label in named]
        counts = Counter(in_files)
        clashing = [i for i, name in enumerate(in_files) if counts[name] > 1]
        if not clashing:
            return named
        longer = [i for i in clashing if lengths[i] < _most(policies[i])]
        if not longer:
            # Nothing is left to add: `a/b.yaml` beside `a-b.yaml`.
            return [
                f"{label} ({number})" if counts[name] > 1 else label
                for number, (label, name) in enumerate(zip(named, in_files, strict=True), start=1)
            ]
        for i in longer:
            lengths[i] += 1


def file_name(label: str) -> str:
    """A label as a part of a file name."""
    return label.replace("/", "-").replace("\\", "-")


def _most(policy: str) -> int:
    return len(Path(policy).resolve().parts) if is_file(policy) else 0


def _label(policy: str, length: int) -> str:
    """Length 0 is the stem, 1 the name of the file, and each further one a folder more."""
    if not is_file(policy):
        return policy
    if length == 0:
        return Path(policy).stem
    return "/".join(Path(policy).resolve().parts[-length:])
