"""The frontend passes on the uninterrupted run, in whatever order its sockets deliver.

A run is a list of *stays*: the instance that produced a stretch of the request's tokens. Each
instance writes to a pipe of its own, in order: at the start of a stay the announcement (but for
the first, which the scheduler chose), then the tokens. The pipes are read in any order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumsched.engine.placement_numbers import PLACEMENTS_PER_EPOCH
from llumsched.frontend.routing.routes import Arrival, Finished, Passed, Routes

REQUEST = "request"


@dataclass
class Output:
    """The part of ``EngineCoreOutput`` that routes look at."""

    new_token_ids: list[int]
    finish_reason: str | None = None
    request_id: str = REQUEST


Message = Output | Arrival


@dataclass(frozen=True)
class Stay:
    """Outputs of ``instance``, each of so many tokens."""

    instance: int
    sizes: tuple[int, ...]


@dataclass
class Reader:
    """A frontend with one request; what it passed on."""

    first_instance: int
    routes: Routes = field(default_factory=Routes)
    passed: list[int] = field(default_factory=list)
    num_finished: int = 0
    unwanted_at: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.routes.open(REQUEST, "external").instance = self.first_instance

    def read(self, instance: int, messages: Sequence[Message]) -> None:
        """Take in messages of one pipe. Outputs next to each other come as one batch."""
        batch: list[Output] = []
        for message in messages:
            if isinstance(message, Output):
                batch.append(message)
                continue
            self._pass_on(instance, batch)
            batch = []
            parts, finished, wanted = self.routes.arrive(REQUEST, message)
            self._note(parts, finished)
            if not wanted:
                self.unwanted_at.append(message.instance)
        self._pass_on(instance, batch)

    def _pass_on(self, instance: int, batch: list[Output]) -> None:
        if batch:
            self._note(*self.routes.pass_on(instance, batch))

    def _note(self, parts: Iterable[Passed], finished: Sequence[Finished]) -> None:
        for part in parts:
            for output in part.outputs:
                self.passed.extend(output.new_token_ids)
        self.num_finished += len(finished)
        assert self.passed == list(range(len(self.passed))), "lost, doubled or out of order"


def pipes_of(
    placement_numbers: Sequence[Stay], *, finishes: bool = True
) -> dict[int, deque[Message]]:
    """Output of each instance. Tokens count up from 0; the last output carries the end."""
    pipes: dict[int, deque[Message]] = {
        placement_number.instance: deque() for placement_number in placement_numbers
    }
    num_tokens = 0
    output = None
    for number, placement_number in enumerate(placement_numbers):
        if number:
            pipes[placement_number.instance].append(
                Arrival(placement_number.instance, number, num_tokens)
            )
        for size in placement_number.sizes:
            output = Output(list(range(num_tokens, num_tokens + size)))
            pipes[placement_number.instance].append(output)
            num_tokens += size
    if finishes:
        if output is None or output is not pipes[placement_numbers[-1].instance][-1]:
            output = Output([])  # as when its last token is a stop token that is not passed on
            pipes[placement_numbers[-1].instance].append(output)
        output.finish_reason = "stop"
    return pipes


def num_tokens_of(placement_numbers: Sequence[Stay]) -> int:
    return sum(sum(placement_number.sizes) for placement_number in placement_numbers)


@st.composite
def runs(draw: st.DrawFn) -> list[Stay]:
    """A run over up to three instances, of which no two successive stays share one. A stay may
    be empty: the request moved on before it decoded there."""
    sizes = st.lists(st.integers(1, 3), max_size=4).map(tuple)
    placement_numbers = [Stay(draw(st.integers(0, 2)), draw(sizes))]
    for _ in range(draw(st.integers(0, 6))):
        others = [i for i in range(3) if i != placement_numbers[-1].instance]
        placement_numbers.append(Stay(draw(st.sampled_from(others)), draw(sizes)))
    return placement_numbers


def read_some(data: st.DataObject, reader: Reader, pipes: dict[int, deque[Message]]) -> None:
    """Read the next few messages of any pipe that has some."""
    instance = data.draw(st.sampled_from(sorted(i for i, pipe in pipes.items() if pipe)))
    num_messages = data.draw(st.integers(1, len(pipes[instance])))
    reader.read(instance, [pipes[instance].popleft() for _ in range(num_messages)])


@given(st.data(), runs())
def test_any_order_of_delivery_gives_the_uninterrupted_run(
    data: st.DataObject, placement_numbers: list[Stay]
) -> None:
    pipes, reader = pipes_of(placement_numbers), Reader(placement_numbers[0].instance)
    while any(pipes.values()):
        read_some(data, reader, pipes)
    assert reader.passed == list(range(num_tokens_of(placement_numbers)))
    assert reader.num_finished == 1
    assert len(reader.routes) == 0


@given(st.data(), runs())
def test_what_was_passed_on_is_all_that_could_be(
    data: st.DataObject, placement_numbers: list[Stay]
) -> None:
    """Nothing is held back for longer than its predecessors are missing."""
    pipes, reader = (
        pipes_of(placement_numbers, finishes=False),
        Reader(placement_numbers[0].instance),
    )
    delivered: set[int] = set()
    announced = {0}
    while any(pipes.values()):
        before = {i: list(pipe) for i, pipe in pipes.items()}
        read_some(data, reader, pipes)
        for instance, messages in before.items():
            for message in messages[: len(messages) - len(pipes[instance])]:
                if isinstance(message, Arrival):
                    announced.add(message.placement_number)
                else:
                    delivered.update(message.new_token_ids)
        expected = 0
        start = 0
        for number, placement_number in enumerate(placement_numbers):
            end = start + sum(placement_number.sizes)
            if number not in announced and placement_number.sizes:
                break
            while expected < end and expected in delivered:
                expected += 1
            if expected < end:
                break
            start = end
        assert len(reader.passed) == expected


@given(st.data(), runs())
def test_an_abort_reaches_every_instance_that_may_run_it(
    data: st.DataObject, placement_numbers: list[Stay]
) -> None:
    """The client leaves at any point: each instance from which anything arrives later is either
    told at once or when its announcement comes, and nothing is passed on any more."""
    pipes, reader = (
        pipes_of(placement_numbers, finishes=False),
        Reader(placement_numbers[0].instance),
    )
    while any(pipes.values()) and data.draw(st.booleans()):
        read_some(data, reader, pipes)
    num_passed = len(reader.passed)
    last_known = {placement_numbers[0].instance}
    route = reader.routes.close(REQUEST)
    assert route is not None
    told = set(reader.routes.holders(route))
    assert told >= {route.instance}
    while any(pipes.values()):
        read_some(data, reader, pipes)
    assert len(reader.passed) == num_passed
    assert placement_numbers[-1].instance in told | set(reader.unwanted_at) | last_known


@pytest.mark.parametrize("size", [1, 5])
def test_tokens_that_overtake_the_last_ones_of_the_source_wait(size: int) -> None:
    reader = Reader(0)
    reader.read(1, [Arrival(1, 1, 2), Output([2 + i for i in range(size)])])
    assert reader.passed == []
    reader.read(0, [Output([0])])
    assert reader.passed == [0]
    reader.read(0, [Output([1])])
    assert reader.passed == list(range(2 + size))


def test_a_second_stay_is_not_taken_for_the_first() -> None:
    """There and back again, and everything of the first instance arrives before anything of
    the second."""
    reader = Reader(0)
    reader.read(0, [Output([0]), Arrival(0, 2, 2), Output([2])])
    assert reader.passed == [0]
    reader.read(1, [Arrival(1, 1, 1), Output([1])])
    assert reader.passed == [0, 1, 2]


def test_a_request_that_nobody_waits_for_is_unwanted() -> None:
    reader = Reader(0)
    reader.routes.close(REQUEST)
    reader.read(1, [Arrival(1, 1, 0), Output([0])])
    assert reader.unwanted_at == [1]
    assert reader.passed == []


def test_requests_do_not_disturb_each_other() -> None:
    routes = Routes()
    for name in ("a", "b"):
        routes.open(name, name).instance = 0
    parts, finished = routes.pass_on(
        0, [Output([0], request_id="a"), Output([0], "stop", "b"), Output([1], request_id="a")]
    )
    assert [output.request_id for part in parts for output in part.outputs] == ["a", "b", "a"]
    assert finished == [Finished("b", 1)]
    assert [name for name, _ in routes] == ["a"]
    assert routes.num_requests(0) == 1


# ---- instances that die --------------------------------------------------------------------------

SERIES = PLACEMENTS_PER_EPOCH


def resumed(reader: Reader, dead: int, instance: int) -> set[int]:
    """Instance ``dead`` dies, and the request goes on at ``instance``."""
    assert reader.routes.lose(dead) == [REQUEST]
    route = reader.routes.get(REQUEST)
    assert route is not None
    assert route.instance is None
    return reader.routes.settle(route, instance, is_announced=True)


def test_a_request_goes_on_from_what_was_passed_on() -> None:
    reader = Reader(0)
    reader.read(0, [Output([0, 1])])
    assert resumed(reader, 0, 1) == set()
    reader.read(0, [Output([2, 3])])  # from the dead one's pipe, too late
    assert reader.passed == [0, 1]
    reader.read(1, [Arrival(1, SERIES, 2), Output([2]), Output([3], "stop")])
    assert reader.passed == [0, 1, 2, 3]
    assert reader.num_finished == 1


def test_a_commit_whose_destination_died_is_not_waited_for() -> None:
    """The destination took the request over and said so; its source has still to send token 1."""
    reader = Reader(0)
    reader.read(1, [Arrival(1, 1, 2), Output([2])])
    reader.read(0, [Output([0])])
    assert resumed(reader, 1, 2) == {0}, "the source may resume it by itself"
    reader.read(0, [Output([1]), Output([2])])
    reader.read(2, [Arrival(2, SERIES, 1), Output([1, 2, 3])])
    assert reader.passed == [0, 1, 2, 3]


def test_the_source_of_a_commit_that_died_at_once_does_not_run_it_twice() -> None:
    reader = Reader(0)
    reader.read(0, [Output([0])])
    reader.read(1, [Arrival(1, 1, 1), Output([1])])
    assert resumed(reader, 1, 2) == {0}


def test_an_abort_reaches_where_the_request_came_from() -> None:
    """If the destination dies before it has acknowledged, the source goes on by itself."""
    reader = Reader(0)
    reader.read(0, [Output([0])])
    reader.read(1, [Arrival(1, 1, 1)])
    route = reader.routes.get(REQUEST)
    assert route is not None
    assert reader.routes.holders(route) == {0, 1}


def test_a_copy_that_arrives_after_the_request_was_resumed_is_unwanted() -> None:
    """The source died between the commit and its last tokens; the destination's word is slow."""
    reader = Reader(0)
    resumed(reader, 0, 2)
    reader.read(1, [Arrival(1, 1, 3), Output([3])])
    assert reader.unwanted_at == [1]
    reader.read(2, [Arrival(2, SERIES, 0), Output([0, 1])])
    assert reader.passed == [0, 1]


def test_the_copy_at_the_chosen_instance_is_replaced_not_aborted() -> None:
    reader = Reader(0)
    resumed(reader, 0, 1)
    reader.read(1, [Arrival(1, 1, 3), Output([3]), Arrival(1, SERIES, 0), Output([0])])
    assert reader.unwanted_at == []
    assert reader.passed == [0]


def test_an_abort_reaches_copies_that_the_dead_left_behind() -> None:
    reader = Reader(0)
    reader.read(1, [Arrival(1, 1, 2)])
    assert reader.routes.lose(0) == [REQUEST]
    route = reader.routes.close(REQUEST)
    assert route is not None
    assert reader.routes.holders(route) == {1}


def test_a_request_elsewhere_does_not_notice() -> None:
    reader = Reader(0)
    reader.read(0, [Output([0])])
    reader.read(1, [Arrival(1, 1, 1), Output([1])])
    assert reader.routes.lose(0) == []
    reader.read(1, [Output([2])])
    assert reader.passed == [0, 1, 2]


def test_resumptions_without_a_token_between_are_counted() -> None:
    reader = Reader(0)
    for death in range(3):
        resumed(reader, death, death + 1)
    route = reader.routes.get(REQUEST)
    assert route is not None
    assert route.num_fruitless_resumptions == 3
    reader.read(3, [Arrival(3, 3 * SERIES, 0), Output([0])])
    resumed(reader, 3, 4)
    assert route.num_fruitless_resumptions == 1
    assert route.num_resumptions == 4


@given(st.data(), runs())
def test_whatever_dies_when_the_client_has_every_token_once(
    data: st.DataObject, placement_numbers: list[Stay]
) -> None:
    """At any moment an instance dies: what it had not sent is lost, what it had sent may still
    come. If the request was its, another computes it again from what was passed on."""
    pipes, reader = pipes_of(placement_numbers), Reader(placement_numbers[0].instance)
    num_tokens = num_tokens_of(placement_numbers)
    dead: set[int] = set()
    spare = 10
    while any(pipes.values()):
        read_some(data, reader, pipes)
        route = reader.routes.get(REQUEST)
        if route is None or route.instance is None or not data.draw(st.booleans()):
            continue
        victim = data.draw(
            st.sampled_from(sorted({route.instance, placement_numbers[-1].instance}))
        )
        if victim in dead:
            continue
        dead.add(victim)
        if data.draw(st.booleans()):
            pipes.pop(victim, None)
        if reader.routes.lose(victim):
            # From now on the request is where it was resumed: old copies come to nothing.
            unwanted = reader.routes.settle(route, spare, is_announced=True)
            assert victim not in unwanted
            start = route.num_tokens
            rest = [Output([token]) for token in range(start, num_tokens)] or [Output([])]
            rest[-1].finish_reason = "stop"
            pipes[spare] = deque([Arrival(spare, route.placement_number, start), *rest])
            spare += 1
        else:
            break
    route = reader.routes.get(REQUEST)
    if route is None:
        assert reader.passed == list(range(num_tokens))
        assert reader.num_finished == 1
