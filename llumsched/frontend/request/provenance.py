"""Where an answer comes from, in its headers: the instance, the policy, its reason, migrations.

    x-llumsched-instance    instance-1                 several, with commas, of several sequences
    x-llumsched-policy      latency
    x-llumsched-reason      freeness=12.3
    x-llumsched-migrations  2                          of an answer that is not streamed

A streamed answer's head goes out before its first token, so the instances where it ended and the
number of migrations come at its end, as a comment of the event stream before ``[DONE]``, which
clients skip. A stream of another form, which ends without ``[DONE]``, has no comment.

This module is told of placements by whoever makes them; it does not know when an answer is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from llumsched.wire.names import instance_name

INSTANCE = b"x-llumsched-instance"
POLICY = b"x-llumsched-policy"
REASON = b"x-llumsched-reason"
MIGRATIONS = b"x-llumsched-migrations"
DONE = b"data: [DONE]\n\n"
MAX_REASON_LENGTH = 200


class Placed(Protocol):
    """A request's route: ``instance`` is that which has it now."""

    instance: int | None

    @property
    def num_moves(self) -> int: ...


class Provenance:
    """Of one answer, which may be of several sequences."""

    def __init__(self) -> None:
        self._routes: list[Placed] = []
        self._reason = ""

    def reasoned(self, reason: str) -> None:
        """The scheduler gave this reason for a sequence's place; the last one is told."""
        self._reason = reason

    def placed(self, route: Placed) -> None:
        """A sequence has its instance."""
        self._routes.append(route)

    def headers(self, policy: str, *, is_complete: bool) -> Iterator[tuple[bytes, bytes]]:
        """Headers known by now; none for an answer that needed no instance.

        Args:
            policy: the bundle in force.
            is_complete: whether no token is to come any more.
        """
        if not self._routes:
            return
        yield INSTANCE, self._instances
        yield POLICY, _header(policy)
        yield REASON, _header(self._reason)
        if is_complete:
            yield MIGRATIONS, str(self._num_moves).encode()

    def with_comment(self, body: bytes) -> bytes:
        """The end of an event stream, with what is known only now; any other part as it is."""
        if not self._routes or not body.endswith(DONE):
            return body
        where = b": %s: %s\n" % (INSTANCE, self._instances)
        moved = b": %s: %d\n\n" % (MIGRATIONS, self._num_moves)
        return body.removesuffix(DONE) + where + moved + DONE

    @property
    def _instances(self) -> bytes:
        known = {route.instance for route in self._routes if route.instance is not None}
        return ",".join(instance_name(instance) for instance in sorted(known)).encode()

    @property
    def _num_moves(self) -> int:
        return sum(route.num_moves for route in self._routes)


def _header(text: str) -> bytes:
    """Text as a header can have it: one line of printable ASCII."""
    printable = "".join(c if " " <= c <= "~" else "?" for c in text)
    return printable[:MAX_REASON_LENGTH].encode("ascii")
