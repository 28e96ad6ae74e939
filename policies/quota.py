"""Admission by quotas: so many requests and tokens a minute for each client.

Each client has two token buckets (Turner, "New directions in communications", 1986), full at first,
that fill within a minute; a request takes one request, and its prompt with its limit on output,
from them. One that finds too little is rejected with the time after which there is enough.

Invariant: a request is charged once, however often it is judged. One longer than a whole minute's
tokens is admitted when the bucket is full, and leaves it in debt. At most `max_clients` clients are
remembered, the one longest unseen going first.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llumsched.core.params import param
from llumsched.core.policy import Admit, Reject, Verdict
from llumsched.core.snapshot import ClusterSnapshot
from llumsched.core.types import Allowance, Budget, SchedulingRequest

MINUTE_S = 60.0
MOST_JUDGED = 100_000
ANONYMOUS = ""


@dataclass(slots=True)
class _Buckets:
    num_requests: float
    num_tokens: float
    at_s: float


@dataclass(slots=True, kw_only=True)
class Quota:
    """Reject a request whose client has used up its requests or tokens of a minute."""

    requests_per_minute: int = param(60, "Requests a minute and client. 0: no limit.", at_least=0)
    tokens_per_minute: int = param(
        0,
        "Tokens a minute and client: the prompt, and the most that it may be answered with. 0: no"
        " limit.",
        at_least=0,
    )
    max_clients: int = param(65_536, "How many clients are remembered.", at_least=1)
    _clients: OrderedDict[str, _Buckets] = field(default_factory=OrderedDict, init=False)
    _charged: OrderedDict[str, None] = field(default_factory=OrderedDict, init=False)

    def admit(self, request: SchedulingRequest, cluster: ClusterSnapshot) -> Verdict:
        client = request.client_id or ANONYMOUS
        buckets = self._filled(client, cluster.now)
        if request.request_id in self._charged:
            return Admit(allowance=self._allowance(buckets))
        num_tokens = request.num_prompt_tokens + (request.max_output_tokens or 0)
        shortages = (
            ("requests", self.requests_per_minute, buckets.num_requests, 1),
            ("tokens", self.tokens_per_minute, buckets.num_tokens, num_tokens),
        )
        for what, limit, available, needed in shortages:
            missing = min(needed, limit) - available
            if limit and missing > 0:
                return Reject(
                    reason=f"the client's quota of {limit:,} {what} a minute is used up",
                    retry_after_s=missing * MINUTE_S / limit,
                    is_client_limit=True,
                    allowance=self._allowance(buckets),
                )
        buckets.num_requests -= 1
        buckets.num_tokens -= num_tokens
        self._charged[request.request_id] = None
        if len(self._charged) > MOST_JUDGED:
            self._charged.popitem(last=False)
        return Admit(allowance=self._allowance(buckets))

    def _allowance(self, buckets: _Buckets) -> Allowance:
        return Allowance(
            requests=_budget(self.requests_per_minute, buckets.num_requests),
            tokens=_budget(self.tokens_per_minute, buckets.num_tokens),
        )

    def _filled(self, client: str, now_s: float) -> _Buckets:
        """The buckets of a client as they are by now."""
        most_requests, most_tokens = float(self.requests_per_minute), float(self.tokens_per_minute)
        buckets = self._clients.get(client)
        if buckets is None:
            buckets = self._clients[client] = _Buckets(most_requests, most_tokens, now_s)
            if len(self._clients) > self.max_clients:
                self._clients.popitem(last=False)
        self._clients.move_to_end(client)
        share = max(0.0, now_s - buckets.at_s) / MINUTE_S
        buckets.num_requests = min(most_requests, buckets.num_requests + share * most_requests)
        buckets.num_tokens = min(most_tokens, buckets.num_tokens + share * most_tokens)
        buckets.at_s = now_s
        return buckets

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "clients": [
                [client, b.num_requests, b.num_tokens, b.at_s]
                for client, b in self._clients.items()
            ],
            "charged": list(self._charged),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        for client, num_requests, num_tokens, at_s in state["clients"]:
            self._clients[client] = _Buckets(num_requests, num_tokens, at_s)
        self._charged.update(dict.fromkeys(state["charged"]))


def _budget(limit: int, available: float) -> Budget | None:
    """A bucket as its client is told of it; None without a limit."""
    if not limit:
        return None
    return Budget(
        limit=limit,
        remaining=max(0, math.floor(available)),
        reset_s=(limit - available) * MINUTE_S / limit,
    )
