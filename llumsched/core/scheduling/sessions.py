"""Where the last turn of each session ran.

A session is remembered for `session_ttl_s` after its last turn: across a call of a tool, say. At
most `MOST_SESSIONS` are, the one longest unseen going first.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import msgspec

from llumsched.core.options import SchedulerOptions
from llumsched.core.policy import Placement
from llumsched.core.snapshot import BoolColumn, ClusterSnapshot
from llumsched.core.types import SchedulingRequest

MOST_SESSIONS = 65_536


class Sessions:
    """See the module docstring."""

    def __init__(self, options: SchedulerOptions) -> None:
        self._options = options
        self._homes: OrderedDict[tuple[str | None, str], tuple[str, float]] = OrderedDict()

    def ran(self, request: SchedulingRequest, instance_id: str, now: float) -> None:
        """Note that a turn is, or has just been, at an instance."""
        if request.session_id is None or not self._options.session_ttl_s:
            return
        key = (request.client_id, request.session_id)
        self._homes[key] = (instance_id, now)
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
        home_id = self._home(request, cluster.now)
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

    def _home(self, request: SchedulingRequest, now: float) -> str | None:
        if request.session_id is None:
            return None
        instance_id, seen_s = self._homes.get((request.client_id, request.session_id), ("", now))
        is_known = instance_id and now - seen_s <= self._options.session_ttl_s
        return instance_id if is_known else None

    def state(self) -> list[list[Any]]:
        """State for a checkpoint."""
        return [[*key, *home] for key, home in self._homes.items()]

    def restore(self, state: Iterable[list[Any]]) -> None:
        """Go on from a checkpoint."""
        self._homes.clear()
        for client_id, session_id, instance_id, seen_s in state:
            self._homes[(client_id, session_id)] = (instance_id, seen_s)
