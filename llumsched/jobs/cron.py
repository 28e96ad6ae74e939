"""Times of a cron expression, to the second: APScheduler's, read as crontab and Quartz write them.

Where a day of the month and a day of the week are both given, both must hold.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

from apscheduler.triggers.cron import CronTrigger

DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


class CronError(ValueError):
    """Something of a job cannot be read; the message names the fix."""


@lru_cache(maxsize=1024)
def cron_trigger(expression: str, zone: ZoneInfo) -> CronTrigger:
    """Trigger of an expression of six fields, or of five without seconds.

    Raises:
        CronError: the expression is none.
    """
    parts = expression.split()
    if len(parts) == 5:
        parts = ["0", *parts]
    if len(parts) != 6:
        raise CronError(
            f"cron {expression!r} must have six fields: second, minute, hour, day of the month,"
            " month, day of the week; or five, without the second"
        )
    second, minute, hour, day, month, weekday = ("*" if part == "?" else part for part in parts)
    try:
        return CronTrigger(
            second=second,
            minute=minute,
            hour=hour,
            day="last" if day == "L" else day,
            month=month,
            day_of_week=_weekdays(weekday.lower()),
            timezone=zone,
        )
    except (ValueError, TypeError) as error:
        raise CronError(f"cron {expression!r}: {error}") from None


def _weekdays(field: str) -> str:
    """Days by name, since APScheduler's numbers begin with Monday and crontab's with Sunday."""
    if field == "*":
        return field
    found: set[int] = set()
    for part in field.split(","):
        days, _, step = part.partition("/")
        first, dash, last = days.partition("-")
        if days == "*":
            first, dash, last = "0", "-", "6"
        begin = _weekday(first)
        end = _weekday(last) if dash else (6 if step else begin)
        if end < begin:
            end += 7
        found.update(day % 7 for day in range(begin, end + 1, int(step) if step else 1))
    return ",".join(DAYS[day] for day in sorted(found))


def _weekday(text: str) -> int:
    if text in DAYS:
        return DAYS.index(text)
    if text.isdigit() and 0 <= int(text) <= 7:
        return int(text) % 7 if text != "7" else 0
    raise ValueError(f"{text!r} is no day of the week: 0 to 7, or {', '.join(DAYS)}")


def next_time(trigger: CronTrigger, after: float, zone: ZoneInfo) -> float | None:
    """The first time later than `after`, in seconds since the epoch; None if there is none."""
    begin = datetime.fromtimestamp(after, zone) + timedelta(microseconds=1)
    found = trigger.get_next_fire_time(None, begin)
    return None if found is None else found.timestamp()
