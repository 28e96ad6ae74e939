"""Which instance each request's tokens come from, and the order in which they are passed on.

A request that moves sends its last source token and its first destination token on different
sockets, so they may arrive in either order. The destination announces "outputs start at n";
tokens from an instance that is not (yet) the request's own are held until exactly ``n`` tokens
have been passed on, then the request belongs to that instance and what was held follows.

Invariant: for every request the tokens passed on are those of one uninterrupted run, none
lost, none doubled. Pure bookkeeping: no sockets, no clock, no knowledge of vLLM's types beyond
``request_id``, ``new_token_ids`` and ``finish_reason`` of an output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class Output(Protocol):
    """The part of vLLM's ``EngineCoreOutput`` that routing looks at."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: Any


@dataclass(slots=True)
class Route:
    """``instance`` is ``None`` until the scheduler has chosen one. ``external_id`` is the id the
    client knows, of which there may be several sequences (``n`` > 1)."""

    external_id: str
    instance: int | None = None
    num_moves: int = 0
    num_tokens: int = 0
    arrivals: list[Arrival] = field(default_factory=list)
    held: dict[int, list[Output]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Arrival:
    """An announcement: the request's outputs from token ``num_tokens`` on come from
    ``instance``, which is the ``num_moves``-th after the first."""

    instance: int
    num_moves: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Passed:
    """Outputs of one instance, in order, that may go to the output processor now."""

    instance: int
    outputs: Sequence[Output]


class Routes:
    """The frontend's requests and the instances that run them."""

    def __init__(self) -> None:
        self._routes: dict[str, Route] = {}

    def __len__(self) -> int:
        return len(self._routes)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._routes

    def __iter__(self) -> Iterator[tuple[str, Route]]:
        return iter(list(self._routes.items()))

    def get(self, request_id: str) -> Route | None:
        return self._routes.get(request_id)

    def open(self, request_id: str, external_id: str | None = None) -> Route:
        """Begin to follow a request that has no instance yet."""
        route = self._routes[request_id] = Route(external_id or request_id)
        return route

    def close(self, request_id: str) -> Route | None:
        """Stop following a request; whatever still arrives for it is dropped."""
        return self._routes.pop(request_id, None)

    def num_requests(self, instance: int) -> int:
        return sum(route.instance == instance for route in self._routes.values())

    def holders(self, route: Route) -> set[int]:
        """Every instance that may run the request now: its own, and any it is arriving at."""
        found = {arrival.instance for arrival in route.arrivals} | set(route.held)
        if route.instance is not None:
            found.add(route.instance)
        return found

    def pass_on(self, instance: int, outputs: Sequence[Output]) -> tuple[list[Passed], list[str]]:
        """Take in what ``instance`` sent.

        Returns:
            what may be passed on, in order, and the ids of the requests that finished with it.
        """
        own: list[Output] = []
        drained: list[Passed] = []
        finished: list[str] = []
        for output in outputs:
            route = self._routes.get(output.request_id)
            if route is None:
                continue  # aborted meanwhile
            if route.instance != instance:
                route.held.setdefault(instance, []).append(output)
                continue
            own.append(output)
            route.num_tokens += len(output.new_token_ids)
            if output.finish_reason is not None:
                del self._routes[output.request_id]
                finished.append(output.request_id)
            elif route.arrivals:
                self._switch(output.request_id, route, drained, finished)
        passed = [Passed(instance, own)] if own else []
        return passed + drained, finished

    def arrive(self, request_id: str, arrival: Arrival) -> tuple[list[Passed], list[str], bool]:
        """Take in the announcement that a request has moved.

        Returns:
            as ``pass_on``, and whether the request is still wanted: if not, the caller has to
            abort it at ``arrival.instance``.
        """
        route = self._routes.get(request_id)
        if route is None:
            return [], [], False
        drained: list[Passed] = []
        finished: list[str] = []
        route.arrivals.append(arrival)
        self._switch(request_id, route, drained, finished)
        return drained, finished, True

    def _switch(
        self, request_id: str, route: Route, drained: list[Passed], finished: list[str]
    ) -> None:
        """Follow the request to where its next token comes from, as often as it moved."""
        while True:
            # A later move that starts at this very token makes the earlier ones moot.
            due = [
                a
                for a in route.arrivals
                if a.num_moves > route.num_moves and a.num_tokens == route.num_tokens
            ]
            if not due:
                return
            arrival = max(due, key=lambda a: a.num_moves)
            route.instance, route.num_moves = arrival.instance, arrival.num_moves
            route.arrivals = [a for a in route.arrivals if a.num_moves > route.num_moves]
            outputs: list[Output] = []
            held = route.held.pop(arrival.instance, [])
            while held:
                output = held.pop(0)
                outputs.append(output)
                route.num_tokens += len(output.new_token_ids)
                if output.finish_reason is not None:
                    del self._routes[request_id]
                    finished.append(request_id)
                    break
                if any(a.num_tokens == route.num_tokens for a in route.arrivals):
                    break
            if held and request_id in self._routes:
                # It came back here later: the rest is of that stay.
                route.held[arrival.instance] = held
            if outputs:
                drained.append(Passed(arrival.instance, outputs))
            if request_id not in self._routes:
                return
