"""The frontends as the scheduler knows them: their connections, and whose each request is.

A frontend has a name that outlives its connections: ZMQ gives it another connection whenever one
breaks. What a dead frontend had sent and nobody had read yet may come after the word of its death.

Invariant: nothing is taken from a connection of a frontend that is known to be dead. A frontend
that is started in its place has the same name and another connection.
"""

from __future__ import annotations

from collections import deque

NUM_DEAD_KEPT = 256


class FrontendRegistry:
    """Connections are those of the scheduler's socket."""

    def __init__(self) -> None:
        self._names: dict[bytes, str] = {}
        # What a dead frontend had sent comes soon after its death or never: the latest are enough.
        self._dead: deque[bytes] = deque(maxlen=NUM_DEAD_KEPT)
        self._asked_by: dict[str, bytes] = {}

    def register(self, identity: bytes, frontend_id: str) -> None:
        """A frontend speaks by this connection."""
        self._names[identity] = frontend_id

    def is_dead(self, identity: bytes) -> bool:
        """True if the connection is that of a frontend that has died since."""
        return identity in self._dead

    def asked(self, request_id: str, identity: bytes) -> None:
        """The placement of a request is wanted by this connection."""
        self._asked_by[request_id] = identity

    def of(self, request_id: str) -> bytes | None:
        """The connection that asked for the placement of an unfinished request."""
        return self._asked_by.get(request_id)

    def ended(self, request_id: str) -> None:
        """A request is over."""
        self._asked_by.pop(request_id, None)

    def lose(self, frontend_id: str) -> list[str]:
        """A frontend is dead.

        Returns:
            its unfinished requests, which are forgotten here.
        """
        gone = {identity for identity, name in self._names.items() if name == frontend_id}
        for identity in gone:
            del self._names[identity]
        self._dead.extend(gone)
        lost = [request_id for request_id, asker in self._asked_by.items() if asker in gone]
        for request_id in lost:
            del self._asked_by[request_id]
        return lost
