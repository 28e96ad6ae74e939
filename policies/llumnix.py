"""Llumnix exactly as its paper has it (Sun et al., OSDI '24, section 4.4), to compare with.

Dispatch to the highest freeness of Algorithm 1, where of a queue the head alone counts; one
freeness below which an instance gives requests away and above which it takes them; the request of
low priority with the shortest sequence moves first; scaling by a range of the average freeness. The
numbers that the paper leaves open are its artifact's: a threshold of 10 blocks a request (for its
traces M-M and S-L; 3 for the others: `source_below` and `destination_above`), a decision each
0.2 s, one migration at a time an instance, and no rest for what has moved.

Departure: as with every policy, the scheduler drops a move that would only swap the roles of the
two instances. `latency` is the same idea with two thresholds, cool-downs and room before freeness.
Invariant: no length is predicted, and nothing is held while an instance accepts work.
"""

from llumsched.core.options import SchedulerOptions
from llumsched.core.policy import PolicyBundle
from llumsched.policies.freeness import Freeness
from llumsched.policies.freeness_pairs import FreenessPairs
from llumsched.policies.freeness_range import FreenessRange
from llumsched.policies.low_priority_short import LowPriorityShort


def bundle() -> PolicyBundle:
    """Comparison: freeness dispatch and migration as published (Llumnix, OSDI '24)."""
    return PolicyBundle(
        name="llumnix",
        dispatch=Freeness(room_first=False, growth_weight=0.0),
        migration=FreenessPairs(source_below=10.0, destination_above=10.0),
        scaling=FreenessRange(),
        victim=LowPriorityShort(min_remaining_tokens=0),
        options=SchedulerOptions(
            migration_interval_s=0.2,
            migration_settle_s=0.0,
            max_migrations_in=1,
            max_migrations_out=1,
            relieve_waiting=False,
        ),
    )
