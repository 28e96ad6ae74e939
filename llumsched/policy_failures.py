"""Failures of policies, counted, each said once with its traceback.

A policy that raises or answers nonsense stops nothing: the scheduler decides by itself and returns
a `PolicyFailed`. A host hands each one in here, and shows what is new.

Invariant: exceptions of one type that a policy raised at one place are one kind of failure, and so
are equal complaints about its answers. This module does not know who is told.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llumsched.core.actions import PolicyFailed
from llumsched.logs import FailureLog

MOST_KINDS = 100
"""Kinds that are kept apart: a policy may name another unknown instance each time."""

_Kind = tuple[str, str, tuple[str, int, str] | None]


@dataclass(slots=True, kw_only=True)
class Failure:
    """One kind of failure and how often it was seen."""

    first: PolicyFailed
    count: int = 1

    def sentence(self) -> str:
        """Policy, error and place in one line."""
        place = ""
        if self.first.frames:
            file, line, function = self.first.frames[-1]
            place = f" ({file}:{line}, in {function})"
        return f"policy {self.first.policy} failed: {self.first.error}{place}"


class PolicyFailures:
    """All failures since the beginning, by kind."""

    def __init__(self) -> None:
        self._kinds: dict[_Kind, Failure] = {}
        self.total = 0

    def add(self, failed: PolicyFailed) -> Failure | None:
        """Count one; the failure if it is the first of its kind."""
        self.total += 1
        key: _Kind = (failed.policy, failed.error, None)
        if failed.frames:
            key = (failed.policy, failed.error.partition(":")[0], failed.frames[-1])
        if key not in self._kinds and len(self._kinds) >= MOST_KINDS:
            key = (failed.policy, "other errors", None)
        known = self._kinds.get(key)
        if known is not None:
            known.count += 1
            return None
        self._kinds[key] = found = Failure(first=failed)
        return found

    def __iter__(self) -> Iterator[Failure]:
        """Every kind, in the order of its first time."""
        return iter(self._kinds.values())


def tracebacks(failures: Iterable[Failure]) -> Iterator[str]:
    """The traceback of each place that raised, once."""
    seen = set()
    for failure in failures:
        if failure.first.frames and failure.first.frames[-1] not in seen:
            seen.add(failure.first.frames[-1])
            yield traceback_of(failure.first)


def traceback_of(failed: PolicyFailed) -> str:
    """The traceback as Python prints it, with lines of source where the files are at hand; empty
    for an answer that was wrong."""
    if not failed.frames:
        return ""
    frames = [(file, line, function, None) for file, line, function in failed.frames]
    stack = traceback.StackSummary.from_list(frames).format()
    return "".join(["Traceback (most recent call last):\n", *stack, failed.error])


def log_failure(log: FailureLog, failed: PolicyFailed) -> None:
    """Say that a policy failed: with the traceback the first time, then once in a while."""
    kind = failed.error.partition(":")[0] if failed.frames else failed.error
    log.failed(
        (failed.policy, kind, failed.frames[-1:]),
        "Policy %s failed, and the built-in choice was used: %s",
        failed.policy,
        failed.error,
        details=traceback_of(failed),
    )
