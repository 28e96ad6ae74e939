"""When jobs are due: pure, with the time handed in.

Invariant: a time is decided once. Times up to `decided_until` have been; `decide` answers for those
from there to now.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import datetime

from llumsched.jobs.cron import cron_trigger, next_time
from llumsched.jobs.spec import Job, instant, minute_of_day

MOST_AT_ONCE = 1000
"""Times that one decision keeps; of more, the latest."""


def next_due(job: Job, after: float) -> float | None:
    """The first time later than `after` at which a job is due by itself; None if there is none."""
    if job.cron is not None:
        return next_time(cron_trigger(job.cron, job.zone), after, job.zone)
    return min((t for text in job.at if (t := instant(text, job.zone)) > after), default=None)


def decide(job: Job, decided_until: float, now: float) -> list[float]:
    """Times later than `decided_until` and not later than now at which the job is to run."""
    due = _due_between(job, decided_until, now)
    missed = [time for time in due if now - time > job.grace_s]
    in_time = [time for time in due if now - time <= job.grace_s]
    if job.misfire == "skip":
        return in_time
    if job.misfire == "once" and missed:
        # What is in time is the last itself.
        return in_time or missed[-1:]
    return missed + in_time


def num_missed(job: Job, decided_until: float, now: float) -> int:
    """How many times, later than `decided_until`, passed while nobody looked."""
    return sum(now - time > job.grace_s for time in _due_between(job, decided_until, now))


def _due_between(job: Job, begin: float, end: float) -> list[float]:
    found: deque[float] = deque(maxlen=MOST_AT_ONCE)
    time = next_due(job, begin)
    while time is not None and time <= end:
        found.append(time)
        time = next_due(job, time)
    return list(found)


def is_in_window(job: Job, now: float) -> bool:
    """True if runs of the job may begin now."""
    if job.window is None:
        return True
    local = datetime.fromtimestamp(now, job.zone)
    minute = 60 * local.hour + local.minute
    start, end = minute_of_day(job.window.start), minute_of_day(job.window.end)
    if start < end:
        return start <= minute < end
    return minute >= start or minute < end


def all_ended(states: Sequence[str]) -> bool:
    """True if there are runs and all of them are over."""
    return bool(states) and all(state in ("succeeded", "failed", "skipped") for state in states)
