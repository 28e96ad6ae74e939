"""The default bundle, for chat: Llumnix (OSDI '24).

Dispatch by freeness, load-balancing and de-fragmenting migration, priorities with headroom.
Departures from the paper: two migration thresholds instead of one, and cool-downs against moving
load back and forth (the scheduler's `migration_settle_s`).
"""

from llumsched.core.policy import PolicyBundle
from llumsched.policies.freeness import Freeness
from llumsched.policies.freeness_pairs import FreenessPairs
from llumsched.policies.freeness_range import FreenessRange
from llumsched.policies.low_priority_short import LowPriorityShort


def bundle() -> PolicyBundle:
    """For chat: freest instance, live migration for balance and room, priorities (Llumnix)."""
    return PolicyBundle(
        name="latency",
        dispatch=Freeness(),
        migration=FreenessPairs(),
        scaling=FreenessRange(),
        victim=LowPriorityShort(),
    )
