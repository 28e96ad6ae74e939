"""Pools for the policies that split prefill from decode. Not a policy itself.

Instances started with a role keep it. Among mixed ones the first `prefill_share` in the order of
ids are for prefill. A single instance is in both pools: then nothing is split.

Invariant: neither pool is empty unless the cluster is.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from llumsched.core.policy import MigrationPair
from llumsched.core.snapshot import ROLES, BoolColumn, ClusterSnapshot, FloatColumn, IntColumn, Rows
from llumsched.core.types import InstanceRole

PREFILL_SHARE_DOC = "Share of the instances, where they have no role of their own, for prefill."

_PREFILL, _DECODE = ROLES.index(InstanceRole.PREFILL), ROLES.index(InstanceRole.DECODE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """Rows for prefill and rows for decode, of those that accept work."""

    prefill: BoolColumn
    decode: BoolColumn
    prefill_rows: IntColumn
    """The rows of `prefill` by number."""


def prefill_rows(
    cluster: ClusterSnapshot, prefill_share: float, candidates: BoolColumn | None
) -> Rows:
    """The prefill pool, or what of it are candidates."""
    pools = split(cluster, prefill_share)
    return pools.prefill_rows if candidates is None else pools.prefill & candidates


def split(cluster: ClusterSnapshot, prefill_share: float) -> Pools:
    """The two pools of this moment."""
    return cluster.stable(("pools", prefill_share), lambda: _split(cluster, prefill_share))


def _split(cluster: ClusterSnapshot, prefill_share: float) -> Pools:
    c = cluster.columns
    prefill, decode = c.role == _PREFILL, c.role == _DECODE
    if not prefill.any() and not decode.any():
        num_rows = len(cluster)
        num_prefill = min(max(1, math.floor(prefill_share * num_rows + 0.5)), max(1, num_rows - 1))
        prefill = np.arange(num_rows) < num_prefill
        decode = ~prefill
    else:
        mixed = ~prefill & ~decode
        prefill, decode = prefill | mixed, decode | mixed
    prefill, decode = prefill & c.is_accepting, decode & c.is_accepting
    # A pool that has died out must not stop serving: the other one does both.
    if not prefill.any():
        prefill = decode
    if not decode.any():
        decode = prefill
    return Pools(prefill=prefill, decode=decode, prefill_rows=np.flatnonzero(prefill))


def hand_over(
    cluster: ClusterSnapshot,
    *,
    sources: BoolColumn,
    destinations: BoolColumn,
    load: FloatColumn,
    reason: str,
) -> Iterator[MigrationPair]:
    """Pair every source that runs something with the least loaded destinations, in turns.

    The source's victim policy moves what has its first token; what is still in prefill stays.
    """
    c = cluster.columns
    ids = cluster.instance_ids
    givers = np.flatnonzero(sources & ~destinations & (c.num_running > 0))
    takers = np.flatnonzero(destinations & (c.num_free_blocks > 0))
    if not len(givers) or not len(takers):
        return
    # The stable sort over rows in the order of ids breaks ties by id.
    ordered = takers[np.argsort(load[takers], kind="stable")].tolist()
    for turn, giver in enumerate(givers.tolist()):
        yield MigrationPair(
            source=ids[giver],
            destination=ids[ordered[turn % len(ordered)]],
            reason=reason,
            num_requests=int(c.num_running[giver]),
            balances=False,
        )


def drain(cluster: ClusterSnapshot, load: FloatColumn) -> Iterable[MigrationPair]:
    """Whatever its pool, a draining instance gives what it runs to the least loaded."""
    c = cluster.columns
    draining = c.is_draining & c.is_fresh
    if not draining.any():
        return ()
    return hand_over(
        cluster, sources=draining, destinations=c.is_accepting, load=load, reason="drains"
    )
