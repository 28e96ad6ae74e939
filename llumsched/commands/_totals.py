"""Totals of a pool for ``llumsched status``: requests, KV cache, rates between two looks.

Plain functions of what the admin API answers. What an older server does not tell is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Cluster = Mapping[str, Any]
Requests = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSample:
    """Totals until ``at_s`` (seconds on any clock that only grows)."""

    at_s: float
    num_finished: int
    num_output_tokens: int


def look(cluster: Cluster, requests: Requests, at_s: float) -> ProcessSample | None:
    """The counts of this moment; None from a server that does not count."""
    if "num_output_tokens" not in cluster:
        return None
    running = sum(request["num_output_tokens"] for request in requests)
    return ProcessSample(
        at_s=at_s,
        num_finished=cluster["num_finished_requests"],
        num_output_tokens=cluster["num_output_tokens"] + running,
    )


def rates(before: ProcessSample | None, now: ProcessSample | None) -> str:
    """Requests and tokens a second between two looks; empty if they cannot be told.

    The counts of a client that left vanish, so a rate may come out too small, never negative.
    """
    if before is None or now is None or now.at_s <= before.at_s:
        return ""
    seconds = now.at_s - before.at_s
    finished = max(0, now.num_finished - before.num_finished) / seconds
    tokens = max(0, now.num_output_tokens - before.num_output_tokens) / seconds
    return f"{finished:.1f} requests/s, {tokens:.0f} tokens/s"


def totals(cluster: Cluster, rates_in_words: str = "") -> str:
    """Requests that run, wait and are held, and the use of the KV cache, in one line."""
    loads = [i["load"] for i in cluster["instances"] if i["load"] is not None]
    parts = [f"{sum(load['num_running'] for load in loads)} running"]
    parts.append(f"{sum(load['num_waiting'] for load in loads)} waiting")
    queued = {name: number for name, number in cluster.get("queued", {}).items() if number}
    if "queued" in cluster:
        of_each = ", ".join(f"{number} {name}" for name, number in sorted(queued.items()))
        held = f"{sum(queued.values())} held by the scheduler"
        parts.append(f"{held} ({of_each})" if of_each else held)
    said = [f"requests: {', '.join(parts)}"]
    num_blocks = sum(load["num_total_blocks"] for load in loads)
    if num_blocks:
        num_used = num_blocks - sum(load["num_free_blocks"] for load in loads)
        said.append(f"KV cache: {num_used / num_blocks:.0%} of {num_blocks} blocks")
    if rates_in_words:
        said.append(rates_in_words)
    return "; ".join(said)


def failures(cluster: Cluster) -> str:
    """Which policies failed, and how often; empty if none did."""
    counts = {name: n for name, n in cluster.get("policy_failures", {}).items() if n}
    if not counts:
        return ""
    of_each = ", ".join(f"{name} {number} times" for name, number in sorted(counts.items()))
    return f"FAILED POLICIES: {of_each}; the server's log says how"
