"""Freeness of one load report by itself, as the tests hold the scheduler's columns against it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llumsched.core.load import Headroom, InstanceLoad
from llumsched.core.types import PriorityClass


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreported:
    """Work the scheduler has sent to an instance and the instance has not reported yet.

    It counts as running: an instance that was chosen is expected to admit the request, and a
    burst must see the load it creates itself.
    """

    num_requests: int = 0
    num_blocks: int = 0
    num_high: int = 0


NOTHING_UNREPORTED = Unreported()


def virtual_usage(
    load: InstanceLoad,
    *,
    headroom: Headroom,
    draining: bool = False,
    unreported: Unreported = NOTHING_UNREPORTED,
) -> float:
    """Sum of the virtual usages of an instance's requests, in blocks."""
    if draining:
        return math.inf
    usage = float(load.num_used_blocks + unreported.num_blocks)
    if load.num_waiting:
        usage += load.head_of_line_blocks
    num_high = unreported.num_high
    for priority, num_running in load.num_running_by_class:
        if priority >= PriorityClass.HIGH:
            num_high += num_running
    if num_high:
        # Each of the n requests gets headroom / n: together they claim the headroom once.
        usage += headroom.blocks(PriorityClass.HIGH, load.num_total_blocks)
    return usage


def freeness(
    load: InstanceLoad,
    *,
    headroom: Headroom,
    draining: bool = False,
    unreported: Unreported = NOTHING_UNREPORTED,
) -> float:
    """Decode steps until the instance is full; may be negative; +inf when empty, -inf draining."""
    if draining:
        return -math.inf
    # What is arriving holds blocks already, so it counts as running.
    batch_size = load.num_running + load.num_migrations_in + unreported.num_requests
    usage = virtual_usage(load, headroom=headroom, unreported=unreported)
    if not batch_size and not load.num_waiting and not usage:
        return math.inf
    return (load.num_total_blocks - usage) / max(1, batch_size)
