"""Remarks on runs besides their figures: a pool that is full or idle, failures and their causes.

A remark that holds for several policies is one remark. Invariant: a figure that a reader would
misread without a remark has one. This module does not know where remarks are shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from llumsched.simulator.results.comparison import Run, by_label, number
from llumsched.simulator.results.metrics import Summary

# Half of the requests waiting longer than this for an engine, and for a fair part of their time, is
# a queue that grows; one in a hundred is a burst.
_LONG_WAIT_S = 1.0
_PART_OF_TIME = 0.2
# Below this, and without a queue, any placement is as good as any other.
_IDLE_KV_USAGE = 0.05


def remarks(runs: Sequence[Run]) -> list[str]:
    """Every remark on these runs, the gravest first."""
    return [line for what in (_failures, _rejections, _verdicts) for line in _said_once(runs, what)]


def warnings_of(runs: Sequence[Run]) -> list[str]:
    """Warnings before the numbers are believed: extrapolations, and runs cut short."""
    return _said_once(runs, _warnings)


def _said_once(runs: Sequence[Run], what: Callable[[Sequence[Run]], Iterable[str]]) -> list[str]:
    told: dict[str, list[str]] = {}
    grouped = by_label(runs)
    for label, group in grouped.items():
        for text in dict.fromkeys(what(group)):
            told.setdefault(text, []).append(label)
    return [
        f"{'every policy' if len(names) == len(grouped) > 1 else ', '.join(names)}: {text}"
        for text, names in told.items()
    ]


def _warnings(group: Sequence[Run]) -> Iterator[str]:
    for run in group:
        if not run.is_complete:
            yield f"seed {run.seed} was cut short: its figures are partial"
        yield from run.warnings


def verdict(summary: Summary) -> str:
    """True if a pool was too small for its traffic, had nothing to do, or neither."""
    wait = summary.queueing_s
    use = "" if math.isnan(summary.kv_usage) else f", KV cache {100 * summary.kv_usage:.0f} % full"
    if not wait.count:
        return "nothing finished"
    if wait.p50 > max(_LONG_WAIT_S, _PART_OF_TIME * summary.e2e_s.p50):
        return (
            f"saturated: half of the requests wait more than {number(wait.p50)} s for an engine"
            f"{use}; the latencies are those of a queue that grows. More --instances, a lower"
            " --rate, or other --hardware; --find searches"
        )
    if wait.p99 > _LONG_WAIT_S:
        return (
            f"full at times: one request in a hundred waits more than {number(wait.p99)} s for an"
            f" engine{use}"
        )
    if summary.num_preemptions and summary.itl_max_s.p99 > _LONG_WAIT_S:
        return (
            f"full on some instance at times: {summary.num_preemptions:,} preemptions, and one"
            f" request in a hundred stands still for more than {number(summary.itl_max_s.p99)} s in"
            " the middle of its answer"
        )
    if summary.kv_usage < _IDLE_KV_USAGE:
        return (
            f"nearly idle: the KV cache is {100 * summary.kv_usage:.1f} % full and nobody waits,"
            " so policies can hardly differ; a higher --rate or fewer --instances would tell them"
            " apart"
        )
    return "neither full nor idle: hardly any request waits for an engine"


def _verdicts(group: Sequence[Run]) -> Iterator[str]:
    # Figures of the first seed: seeds seldom differ in this.
    yield verdict(group[0].summary)


def _rejections(group: Sequence[Run]) -> Iterator[str]:
    counts: dict[str, int] = {}
    for run in group:
        for reason, count in run.summary.rejections.items():
            counts[reason] = counts.get(reason, 0) + count
    for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
        yield f"{count:,} rejected: {reason}"


def _failures(group: Sequence[Run]) -> Iterator[str]:
    counts: dict[str, int] = {}
    for run in group:
        for failure in run.policy_failures:
            text = failure.sentence()
            counts[text] = counts.get(text, 0) + failure.count
    for text, count in counts.items():
        yield f"{count:,} x {text}; the scheduler decided by itself, so these are not its figures"
