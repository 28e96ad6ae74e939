"""TetriInfer (Hu et al., 2024): decode placement by predicted length and power of two.

Prefill on the least loaded instance (in chunks: the engine's own chunked prefill); the decode
instance is the better of two random ones with room, by the predicted final size of what it runs, so
that long and short decodes do not gather. Departures: lengths come from the bundle's predictor (a
moving quantile instead of a fine-tuned classifier); the source picks the request, so placement is
decided per pair of instances; and pools do not flip roles.

Invariant: of two sampled instances with room, the one whose requests are predicted to grow larger
never gets the request.
"""

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from llumsched.core.params import param
from llumsched.core.policy import MigrationPair, PolicyBundle
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.policies._pools import PREFILL_SHARE_DOC, drain, split
from llumsched.policies.after_first_token import AfterFirstToken
from llumsched.policies.disaggregated import HAND_OVER_OPTIONS
from llumsched.policies.distserve import ShortestPrefillQueue
from llumsched.policies.moving_quantile import MovingQuantile


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedPowerOfTwo:
    """Hand finished prefills to the lighter of two random decode instances, by predicted size."""

    prefill_share: float = param(0.5, PREFILL_SHARE_DOC, above=0, at_most=1)

    def rebalance(self, cluster: ClusterSnapshot) -> Iterable[MigrationPair]:
        c = cluster.columns
        expected = np.maximum(c.predicted_final_blocks, c.num_used_blocks)
        yield from drain(cluster, expected)
        pools = split(cluster, self.prefill_share)
        sources = np.flatnonzero(pools.prefill & ~pools.decode & (c.num_running > 0))
        # Sorted by room, so that those with enough for a request are the first few.
        decode = np.flatnonzero(pools.decode)
        decode = decode[np.argsort(-c.num_free_blocks[decode], kind="stable")]
        room = (-c.num_free_blocks[decode]).tolist()
        rows = decode.tolist()
        for source in sources.tolist():
            # The paper filters before it samples: enough room for the request that moves.
            num_roomy = bisect.bisect_right(room, -max(1.0, c.victim_blocks.item(source)))
            if not num_roomy:
                continue
            drawn = [rows[cluster.rng.randrange(num_roomy)] for _ in range(2)]
            destination = min(drawn, key=lambda row: (expected.item(row), row))
            yield MigrationPair(
                source=cluster.instance_ids[source],
                destination=cluster.instance_ids[destination],
                reason=f"lighter of two: {expected.item(destination):.0f} blocks predicted",
                num_requests=int(c.num_running[source]),
                balances=False,
            )


def bundle() -> PolicyBundle:
    """Comparison: decode placement by predicted length, power of two (TetriInfer)."""
    return PolicyBundle(
        name="tetriinfer",
        dispatch=ShortestPrefillQueue(),
        migration=PredictedPowerOfTwo(),
        victim=AfterFirstToken(),
        predictor=MovingQuantile(),
        options=HAND_OVER_OPTIONS,
    )
