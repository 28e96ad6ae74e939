"""Which instance each request's tokens come from, and the order in which they are passed on.

A request that moves sends its last source token and its first destination token on different
sockets, so they may arrive in either order. The destination announces "outputs start at n";
tokens of that stay are held until exactly ``n`` tokens have been passed on, then the request
belongs to that instance and what was held follows. Stays are told apart by the number of moves
before them, since a request may come back to an instance while the one between is still silent.

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
    client knows, of which there may be several sequences (``n`` > 1). ``opened_s`` is the
    caller's own clock."""

    external_id: str
    priority_class: int = 0
    opened_s: float = 0.0
    instance: int | None = None
    num_moves: int = 0
    num_tokens: int = 0
    arrivals: list[Arrival] = field(default_factory=list)
    stays: dict[int, int] = field(default_factory=dict)
    """Instance -> the number of moves before the latest stay it has announced."""
    held: dict[int, list[Output]] = field(default_factory=dict)
    """Stay (as the number of moves before it) -> outputs that came too early."""


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


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that ended by itself, and the output tokens it had, wherever they came from."""

    request_id: str
    num_tokens: int


class RouteObserver(Protocol):
    """Hears, once each, what became of a request that was not closed before."""

    def first_token(self, route: Route) -> None: ...

    def moved(self, route: Route) -> None: ...

    def finished(self, route: Route) -> None: ...


class Routes:
    """The frontend's requests and the instances that run them."""

    def __init__(self, observer: RouteObserver | None = None) -> None:
        self._routes: dict[str, Route] = {}
        self._observer = observer

    def __len__(self) -> int:
        return len(self._routes)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._routes

    def __iter__(self) -> Iterator[tuple[str, Route]]:
        return iter(list(self._routes.items()))

    def get(self, request_id: str) -> Route | None:
        return self._routes.get(request_id)

    def open(
        self,
        request_id: str,
        external_id: str | None = None,
        *,
        priority_class: int = 0,
        opened_s: float = 0.0,
    ) -> Route:
        """Begin to follow a request that has no instance yet."""
        route = self._routes[request_id] = Route(
            external_id or request_id, priority_class, opened_s
        )
        return route

    def close(self, request_id: str) -> Route | None:
        """Stop following a request; whatever still arrives for it is dropped."""
        return self._routes.pop(request_id, None)

    def num_requests(self, instance: int) -> int:
        return sum(route.instance == instance for route in self._routes.values())

    def holders(self, route: Route) -> set[int]:
        """Every instance that may run the request now: its own, and any it is arriving at."""
        found = {i for i, num_moves in route.stays.items() if num_moves >= route.num_moves}
        if route.instance is not None:
            found.add(route.instance)
        return found

    def pass_on(
        self, instance: int, outputs: Sequence[Output]
    ) -> tuple[list[Passed], list[Finished]]:
        """Take in what ``instance`` sent.

        Returns:
            what may be passed on, in order, and the requests that finished with it.
        """
        own: list[Output] = []
        drained: list[Passed] = []
        finished: list[Finished] = []
        for output in outputs:
            route = self._routes.get(output.request_id)
            if route is None:
                continue  # aborted meanwhile
            # An instance announces a stay before the first output of it, on the same socket, so
            # an output belongs to the latest stay its instance has announced.
            stay = route.stays.get(instance, 0)
            if stay > route.num_moves:
                route.held.setdefault(stay, []).append(output)
            elif stay == route.num_moves and instance == route.instance:
                own.append(output)
                self._count(output, route, finished)
                if route.arrivals and output.finish_reason is None:
                    self._follow(route, drained, finished)
        passed = [Passed(instance, own)] if own else []
        return passed + drained, finished

    def arrive(
        self, request_id: str, arrival: Arrival
    ) -> tuple[list[Passed], list[Finished], bool]:
        """Take in the announcement that a request has moved.

        Returns:
            as ``pass_on``, and whether the request is still wanted: if not, the caller has to
            abort it at ``arrival.instance``.
        """
        route = self._routes.get(request_id)
        if route is None:
            return [], [], False
        drained: list[Passed] = []
        finished: list[Finished] = []
        route.stays[arrival.instance] = arrival.num_moves
        # Else it has moved on already, from a stay without a single token.
        if arrival.num_moves > route.num_moves:
            route.arrivals.append(arrival)
            self._follow(route, drained, finished)
        return drained, finished, True

    def _follow(self, route: Route, drained: list[Passed], finished: list[Finished]) -> None:
        """Go to where the request's next token comes from, as often as it has moved."""
        while due := [a for a in route.arrivals if a.num_tokens == route.num_tokens]:
            # Of two that start at this very token, the later one has the next token.
            arrival = max(due, key=lambda a: a.num_moves)
            route.instance, route.num_moves = arrival.instance, arrival.num_moves
            if self._observer is not None:
                self._observer.moved(route)
            route.arrivals = [a for a in route.arrivals if a.num_moves > route.num_moves]
            held = route.held.pop(arrival.num_moves, [])
            for output in held:
                self._count(output, route, finished)
            if held:
                drained.append(Passed(arrival.instance, held))

    def _count(self, output: Output, route: Route, finished: list[Finished]) -> None:
        if self._observer is not None and not route.num_tokens and output.new_token_ids:
            self._observer.first_token(route)
        route.num_tokens += len(output.new_token_ids)
        if output.finish_reason is not None:
            del self._routes[output.request_id]
            finished.append(Finished(output.request_id, route.num_tokens))
            if self._observer is not None:
                self._observer.finished(route)
