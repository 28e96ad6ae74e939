"""The rest of a client's quota, in the headers that OpenAI's API has for it."""

from __future__ import annotations

import math

from llumsched.core.types import Allowance


def rate_limit_headers(allowance: Allowance) -> dict[str, str]:
    """`x-ratelimit-limit-requests` and its kin, of each kind of limit that there is."""
    headers = {}
    for kind, budget in (("requests", allowance.requests), ("tokens", allowance.tokens)):
        if budget is not None:
            headers[f"x-ratelimit-limit-{kind}"] = str(budget.limit)
            headers[f"x-ratelimit-remaining-{kind}"] = str(budget.remaining)
            headers[f"x-ratelimit-reset-{kind}"] = duration(budget.reset_s)
    return headers


def duration(seconds: float) -> str:
    """Seconds as OpenAI writes them, rounded up: `120ms`, `1s`, `6m0s`."""
    if seconds <= 0:
        return "0s"
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{minutes}m{rest}s" if minutes or hours else f"{rest}s"
    return f"{hours}h{text}" if hours else text
