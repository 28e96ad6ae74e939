"""Which prompts are long, and which instance is being cleared for the first of those held.

Invariant: both follow from the snapshot alone, so that dispatch, admission and migration, each of
which asks, get the same answer.
"""

from llumsched.core.snapshot import ClusterSnapshot
from llumsched.core.types import SchedulingRequest

LONG_SHARE_DOC = "A prompt of at least this share of the largest instance's blocks is long."


def is_long(request: SchedulingRequest, cluster: ClusterSnapshot, long_share: float) -> bool:
    block_size = cluster.block_size or cluster.stable(
        "smallest block", lambda: min(map(int, cluster.columns.block_size), default=1)
    )
    return request.num_prompt_tokens >= long_share * cluster.max_total_blocks * block_size


def first_held_long(cluster: ClusterSnapshot, long_share: float) -> SchedulingRequest | None:
    """The long prompt that has been held for longest, in the order of dispatch."""
    held = cluster.held()
    return next((request for request in held if is_long(request, cluster, long_share)), None)


def clearing_row(cluster: ClusterSnapshot, long_share: float) -> int | None:
    """The instance that the first held long prompt will take: the one with the fewest blocks to
    move. Once chosen it only becomes freer, so the choice stays."""
    request = first_held_long(cluster, long_share)
    if request is None:
        return None
    return cluster.argmax(cluster.columns.num_room_blocks, cluster.candidates(request))
