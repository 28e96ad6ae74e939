"""Which instance each request's tokens come from, and the order in which they are passed on.

A request that moves sends its last source token and its first destination token on different
sockets, so they may arrive in either order. The destination announces "outputs start at n";
tokens of that stay are held until exactly ``n`` tokens have been passed on, then the request
belongs to that instance and what was held follows. Stays are told apart by their numbers, since a
request may come back to an instance while the one between is still silent. When an instance dies,
its requests begin a new series of stays, from the tokens that were passed on.

Invariant: for every request the tokens passed on are those of one uninterrupted run, none
lost, none doubled. Pure bookkeeping: no sockets, no clock, no knowledge of vLLM's types beyond
``request_id``, ``new_token_ids`` and ``finish_reason`` of an output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llumsched.engine.placement_numbers import epoch_of, first_placement_number, num_moves_within


class Output(Protocol):
    """The part of vLLM's ``EngineCoreOutput`` that routing looks at."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: Any


@dataclass(slots=True)
class Route:
    """``instance`` is ``None`` until the scheduler has chosen one. ``external_id`` is the id the
    client knows, of which there may be several sequences (``n`` > 1). ``opened_s`` is the
    caller's own clock. ``placement_number``: see ``llumsched.engine.placement_numbers``."""

    external_id: str
    priority_class: int = 0
    opened_s: float = 0.0
    num_prompt_tokens: int = 0
    instance: int | None = None
    placement_number: int = 0
    output_token_ids: list[int] = field(default_factory=list)
    """Tokens passed on: from here the request goes on if its instance dies."""
    arrivals: list[Arrival] = field(default_factory=list)
    placement_numbers: dict[int, int] = field(default_factory=dict)
    """Instance -> the latest stay it has announced."""
    held: dict[int, list[Output]] = field(default_factory=dict)
    """Stay -> outputs that came too early."""
    previous_instance: int | None = None
    """The instance before this one: it has the request still, until it knows that it moved."""
    stale_copies: set[int] = field(default_factory=set)
    """Instances that may have a copy of the request from before it was resumed."""
    rejected_by: set[int] = field(default_factory=set)
    """Instances whose engines were paused when the request came."""
    num_past_moves: int = 0
    num_fruitless_resumptions: int = 0
    """How often it was resumed since its last token."""
    is_fruitful: bool = False
    """True if a token has come since it was last resumed."""
    last_token_s: float = 0.0
    """The observer's own clock."""
    pause_cause: str = ""
    """Why its next token comes from another instance than its last; empty if it does not."""

    @property
    def num_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def num_moves(self) -> int:
        """Migrations so far."""
        return self.num_past_moves + num_moves_within(self.placement_number)

    @property
    def num_resumptions(self) -> int:
        """How often an instance died with it."""
        return epoch_of(self.placement_number)


@dataclass(frozen=True, slots=True)
class Arrival:
    """An announcement: from token ``num_tokens`` on the request's outputs come from ``instance``,
    where this is its stay number ``placement_number``."""

    instance: int
    placement_number: int
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

    def tokens(self, route: Route) -> None:
        """The next tokens are passed on, the first ones as well."""

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
        num_prompt_tokens: int = 0,
    ) -> Route:
        """Begin to follow a request that has no instance yet."""
        route = self._routes[request_id] = Route(
            external_id or request_id, priority_class, opened_s, num_prompt_tokens
        )
        return route

    def close(self, request_id: str) -> Route | None:
        """Stop following a request; whatever still arrives for it is dropped."""
        return self._routes.pop(request_id, None)

    def num_requests(self, instance: int) -> int:
        return sum(route.instance == instance for route in self._routes.values())

    def holders(self, route: Route) -> set[int]:
        """Every instance that may run the request now: its own, any it is arriving at, the one it
        came from, which may not know yet that it has moved and would resume it by itself, and
        those that may have a copy from before it was resumed."""
        found = {
            i
            for i, placement_number in route.placement_numbers.items()
            if placement_number >= route.placement_number
        } | route.stale_copies
        return found | {i for i in (route.instance, route.previous_instance) if i is not None}

    def lose(self, instance: int) -> list[str]:
        """``instance`` is dead.

        Returns:
            the requests whose next tokens would have come from there, now or soon. They have no
            instance now, and go on from the tokens passed on so far.
        """
        lost = []
        for request_id, route in self._routes.items():
            if route.instance == instance or any(a.instance == instance for a in route.arrivals):
                self.begin_again(route)
                lost.append(request_id)
            route.stale_copies.discard(instance)
            if route.previous_instance == instance:
                route.previous_instance = None
        return lost

    def was_to_follow(self, request_id: str, arrival: Arrival) -> bool:
        """True if an announcement of a dead instance says that the request is lost."""
        route = self._routes.get(request_id)
        return (
            route is not None
            and arrival.placement_number > route.placement_number
            and epoch_of(arrival.placement_number) == epoch_of(route.placement_number)
        )

    def begin_again(self, route: Route) -> None:
        """Take the request off its instance: whatever comes from there is not passed on."""
        route.stale_copies = self.holders(route)
        route.num_past_moves = route.num_moves
        route.num_fruitless_resumptions = (
            1 if route.is_fruitful else route.num_fruitless_resumptions + 1
        )
        route.is_fruitful = False
        route.pause_cause = "resumption" if route.num_tokens else ""
        route.placement_number = first_placement_number(epoch_of(route.placement_number) + 1)
        route.instance = route.previous_instance = None
        route.arrivals = []
        route.held = {}

    def settle(self, route: Route, instance: int, *, is_announced: bool) -> set[int]:
        """A request that has begun again goes on at ``instance``.

        Args:
            is_announced: whether the instance will announce the stay before its outputs.

        Returns:
            the instances that may have an old copy, to be aborted. Not ``instance`` itself, where
            the request takes the place of its copy.
        """
        route.instance = instance
        if not is_announced:
            route.placement_numbers[instance] = route.placement_number
        stale_copies, route.stale_copies = route.stale_copies - {instance}, set()
        return stale_copies

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
            placement_number = route.placement_numbers.get(instance, 0)
            if placement_number > route.placement_number:
                route.held.setdefault(placement_number, []).append(output)
            elif placement_number == route.placement_number and instance == route.instance:
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
        if epoch_of(arrival.placement_number) < epoch_of(route.placement_number):
            # A copy from before the request was resumed.
            if route.instance is None:
                route.stale_copies.add(arrival.instance)
            return [], [], route.instance in (None, arrival.instance)
        route.placement_numbers[arrival.instance] = arrival.placement_number
        # Else it has moved on already, from a stay without a single token.
        if arrival.placement_number > route.placement_number:
            route.arrivals.append(arrival)
            self._follow(route, drained, finished)
        return drained, finished, True

    def _follow(self, route: Route, drained: list[Passed], finished: list[Finished]) -> None:
        """Go to where the request's next token comes from, as often as it has moved."""
        while due := [a for a in route.arrivals if a.num_tokens == route.num_tokens]:
            # Of two that start at this very token, the later one has the next token.
            arrival = max(due, key=lambda a: a.placement_number)
            route.previous_instance = route.instance
            route.instance, route.placement_number = arrival.instance, arrival.placement_number
            if self._observer is not None:
                self._observer.moved(route)
            if route.num_tokens:
                route.pause_cause = "migration"
            route.arrivals = [
                a for a in route.arrivals if a.placement_number > route.placement_number
            ]
            held = route.held.pop(arrival.placement_number, [])
            for output in held:
                self._count(output, route, finished)
            if held:
                drained.append(Passed(arrival.instance, held))

    def _count(self, output: Output, route: Route, finished: list[Finished]) -> None:
        if self._observer is not None and not route.num_tokens and output.new_token_ids:
            self._observer.first_token(route)
        if output.new_token_ids:
            if self._observer is not None:
                self._observer.tokens(route)
            route.pause_cause = ""
            route.output_token_ids.extend(output.new_token_ids)
            route.is_fruitful = True
        if output.finish_reason is not None:
            del self._routes[output.request_id]
            finished.append(Finished(output.request_id, route.num_tokens))
            if self._observer is not None:
                self._observer.finished(route)
