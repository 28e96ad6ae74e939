"""Pair the least free instances with the freest (Llumnix, OSDI '24, section 4.4).

De-fragmentation needs no rule of its own: an instance with a big prompt stuck at the head of its
queue has low freeness, so its other requests move away. Nor does draining: its freeness is -inf.

Invariant: no instance is in two pairs of one decision. Departure from the paper: the two ends have
thresholds of their own, so that a pair cannot swap its roles for ever.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from llumsched.core.params import ParamError, check_params, param
from llumsched.core.policy import MigrationPair
from llumsched.core.snapshot import BoolColumn, ClusterSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class FreenessPairs:
    """Move requests from instances below one freeness to instances above another."""

    source_below: float = param(
        10.0, "An instance with less freeness than this gives requests away."
    )
    destination_above: float = param(
        20.0, "An instance with more freeness than this takes requests in."
    )

    def __post_init__(self) -> None:
        check_params(self)
        if self.destination_above < self.source_below:
            raise ParamError(
                "destination_above",
                f"destination_above ({self.destination_above:g}) must be at least source_below "
                f"({self.source_below:g}): otherwise two instances exchange requests for ever",
            )

    def rebalance(self, cluster: ClusterSnapshot) -> Iterable[MigrationPair]:
        return self.pairs(cluster, np.ones(len(cluster), dtype=np.bool_))

    def pairs(self, cluster: ClusterSnapshot, among: BoolColumn) -> Iterator[MigrationPair]:
        """The pairs between these rows; for policies that balance only some of them."""
        c = cluster.columns
        freeness = c.freeness
        sources = np.flatnonzero(
            among
            & (freeness < self.source_below)
            & (c.is_accepting | (c.is_draining & c.is_fresh))
            & (c.num_running > 0)
        )
        # What drains must go somewhere: any instance that is not itself short of room will do.
        any_draining = bool(c.is_draining[sources].any())
        floor = self.source_below if any_draining else self.destination_above
        destinations = np.flatnonzero(among & c.is_accepting & (freeness > floor))
        # Rows are sorted by id and the sort is stable, so ties go by instance id.
        sources = sources[np.argsort(freeness[sources], kind="stable")]
        destinations = destinations[np.argsort(-freeness[destinations], kind="stable")]
        ids = cluster.instance_ids
        for source, destination in zip(sources.tolist(), destinations.tolist(), strict=False):
            low, high = freeness.item(source), freeness.item(destination)
            if c.is_draining[source] or high > self.destination_above:
                yield MigrationPair(
                    source=ids[source],
                    destination=ids[destination],
                    reason=f"freeness {low:.1f} -> {high:.1f}",
                )
