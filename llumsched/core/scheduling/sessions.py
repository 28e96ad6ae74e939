"""Where the last turn of each session ran.

A session is remembered for `session_ttl_s` after its last turn: across a call of a tool, say. At
most `MOST_SESSIONS` are, the one longest unseen going first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any

import msgspec

from llumsched.core.options import SchedulerOptions
from llumsched.core.policy import Placement
from llumsched.core.snapshot import BoolColumn, ClusterSnapshot
from llumsched.core.types import SchedulingRequest

MOST_SESSIONS = 65_536

SessionKey = tuple[str | None, str]
"""Client and name."""


@dataclass(frozen=True, slots=True)
class Home:
    """Last turn of a session: where and when it was seen, and its tokens as far as they are
    known."""

    instance_id: str
    seen_s: float
    request_id: str = ""
    num_tokens: int = 0


class Sessions:
    """See the module docstring."""

    def __init__(self, options: SchedulerOptions) -> None:
        self._options = options
        self._homes: OrderedDict[SessionKey, Home] = OrderedDict()

    def ran(
        self,
        request: SchedulingRequest,
        instance_id: str,
        now: float,
        num_output_tokens: int | None = None,
    ) -> None:
        """Note that a turn is, or has just been, at an instance."""
        if request.session_id is None or not self._options.session_ttl_s:
            return
        key = (request.client_id, request.session_id)
        num_tokens = request.num_prompt_tokens + (num_output_tokens or 0)
        self._homes[key] = Home(instance_id, now, request.request_id, num_tokens)
        self._homes.move_to_end(key)
        if len(self._homes) > MOST_SESSIONS:
            self._homes.popitem(last=False)

    def at_home(
        self,
        request: SchedulingRequest,
        cluster: ClusterSnapshot,
        candidates: BoolColumn | None,
        chosen: Placement,
    ) -> Placement:
        """The instance of the last turn of the request's session, where that can take it; else the
        policy's choice.

        A policy that looks at prefixes knows better where the KV of a session is, and one that
        plans a hand-over has a use for its choice: both are left alone.
        """
        home_of = self.home_of(request, cluster.now)
        home_id = None if home_of is None else home_of.instance_id
        if home_id is None or home_id == chosen.instance_id or chosen.hand_over_to is not None:
            return chosen
        row = cluster.rows.get(home_id)
        if row is None or (candidates is not None and not candidates[row]):
            return chosen
        if self._options.prefix_index_blocks and request.prefix_hashes:
            return chosen
        home, other = cluster[home_id], cluster[chosen.instance_id]
        most_requests = other.num_requests + self._options.session_imbalance
        is_crowded = other.has_room(request) and not home.has_room(request)
        if home.role is not other.role or home.num_requests > most_requests or is_crowded:
            return chosen
        reason = "the last turn of its session was here"
        return msgspec.structs.replace(chosen, instance_id=home_id, reason=reason)

    def home_of(self, request: SchedulingRequest, now: float) -> Home | None:
        """Where the session of a request ran last; None for one that is not remembered."""
        if request.session_id is None:
            return None
        return self.home((request.client_id, request.session_id), now)

    def home(self, key: SessionKey, now: float) -> Home | None:
        """Where a session ran last; None if it is not remembered."""
        home = self._homes.get(key)
        is_known = home is not None and now - home.seen_s <= self._options.session_ttl_s
        return home if is_known else None

    def latest(self, now: float) -> Iterator[tuple[SessionKey, Home]]:
        """Every session that is remembered, the one seen last first."""
        for key, home in reversed(self._homes.items()):
            if now - home.seen_s <= self._options.session_ttl_s:
                yield key, home

    def moved(self, key: SessionKey, request_id: str, instance_id: str) -> None:
        """The KV of a turn is at another instance now; nothing if another turn has run since."""
        home = self._homes.get(key)
        if home is not None and home.request_id == request_id:
            self._homes[key] = replace(home, instance_id=instance_id)

    def state(self) -> list[list[Any]]:
        """State for a checkpoint."""
        return [[*key, *astuple(home)] for key, home in self._homes.items()]

    def restore(self, state: Iterable[list[Any]]) -> None:
        """Go on from a checkpoint."""
        self._homes.clear()
        for client_id, session_id, *home in state:
            self._homes[(client_id, session_id)] = Home(*home)
