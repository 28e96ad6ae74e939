"""Requests find another instance when theirs dies, unless they are what it dies of."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from llumsched.engine.base import RequestState
from llumsched.engine.placement_numbers import PLACEMENTS_PER_EPOCH
from llumsched.engine.vllm.migration.state import decode_request
from llumsched.frontend.request.hints import current, hinted
from llumsched.frontend.request.rejection import Rejected
from llumsched.frontend.routing.resumer import MAX_FRUITLESS_RESUMPTIONS, Resumer
from llumsched.frontend.routing.routes import Arrival, Routes
from llumsched.hints import SchedulingHints

TIMEOUT_S = 10.0


@dataclass
class Output:
    request_id: str
    new_token_ids: list[int]
    finish_reason: Any = None


def request(**changes: Any) -> EngineCoreRequest:
    values: dict[str, Any] = {
        "request_id": "r1",
        "prompt_token_ids": [1, 2, 3],
        "mm_features": None,
        "sampling_params": SamplingParams(max_tokens=9, prompt_logprobs=2),
        "pooling_params": None,
        "arrival_time": 0.0,
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    return EngineCoreRequest(**(values | changes))


@dataclass
class World:
    """Instances that take requests over, and a scheduler that names them in turn."""

    placements: list[int | Exception]
    up: set[int] = field(default_factory=lambda: {1, 2, 3})
    gone: set[int] = field(default_factory=lambda: {7})
    fails_on_resume: set[int] = field(default_factory=set)
    refusal: str | None = None
    dies_on_resume: set[int] = field(default_factory=set)
    resumed: list[tuple[int, RequestState]] = field(default_factory=list)
    added: list[int] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    asked: list[tuple[int | None, int, SchedulingHints]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.routes = Routes()
        self.resumer = Resumer(
            self.routes,
            self,
            self,
            lambda _, why: self.given_up.append(why),
            unknown_instance_delay_s=0.0,
        )

    def open(self, asked: EngineCoreRequest, instance: int = 0, num_tokens: int = 2) -> None:
        self.routes.open("r1").instance = instance
        self.resumer.keep(asked)
        if num_tokens:
            self.routes.pass_on(instance, [Output("r1", list(range(num_tokens)))])

    def lose(self, instance: int) -> None:
        self.up.discard(instance)
        self.gone.add(instance)
        self.resumer.resume(self.routes.lose(instance), instance)

    async def place(
        self, request: EngineCoreRequest, *, lost: int | None = None, num_output_tokens: int = 0
    ) -> int:
        self.asked.append((lost, num_output_tokens, current()))
        answer = self.placements.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def is_up(self, instance: int) -> bool:
        return instance in self.up

    def is_gone(self, instance: int) -> bool:
        return instance in self.gone

    async def add(self, instance: int, request: EngineCoreRequest) -> None:
        self.added.append(instance)

    async def resume(self, instance: int, state: bytes) -> str | None:
        if instance in self.dies_on_resume:
            self.up.discard(instance)
            self.gone.add(instance)
            raise ConnectionError(f"instance {instance} died")
        if instance in self.fails_on_resume:
            raise ConnectionError(f"instance {instance} does not take it")
        self.resumed.append((instance, msgspec.msgpack.decode(state, type=RequestState)))
        return self.refusal

    def abort_soon(self, instance: int, request_id: str) -> None:
        self.aborted.append(instance)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await scenario()

    asyncio.run(bounded())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_prompt_parameters_and_delivered_tokens_go_to_the_next_instance() -> None:
    async def scenario() -> None:
        world = World([1])
        with hinted(SchedulingHints(client_id="tenant")):
            world.open(request())
        world.lose(0)
        await settle()
        ((instance, state),) = world.resumed
        assert instance == 1
        assert state.output_token_ids == [0, 1]
        assert state.placement_number == PLACEMENTS_PER_EPOCH
        assert not state.has_kv
        carried = decode_request(state)
        assert carried.prompt_token_ids == [1, 2, 3]
        assert carried.sampling_params is not None
        assert carried.sampling_params.max_tokens == 9
        assert carried.sampling_params.prompt_logprobs is None, "the client has them"
        assert world.asked == [(0, 2, SchedulingHints(client_id="tenant"))]
        assert world.given_up == []

    run(scenario)


def test_a_request_that_goes_on_elsewhere_is_a_line_with_its_ids(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "llumsched")

    async def scenario() -> None:
        world = World([1])
        world.open(request())
        world.lose(0)
        await settle()

    run(scenario)
    (record,) = caplog.records
    assert record.getMessage() == (
        "Request r1 goes on at instance-1 from token 2, since instance-0 was lost"
    )
    assert (record.__dict__["request_id"], record.__dict__["instance_id"]) == ("r1", "instance-1")


def test_prompt_logprobs_that_were_not_sent_yet_are_asked_for_again() -> None:
    async def scenario() -> None:
        world = World([1])
        world.open(request(), num_tokens=0)
        world.lose(0)
        await settle()
        sampling = decode_request(world.resumed[0][1]).sampling_params
        assert sampling is not None
        assert sampling.prompt_logprobs == 2

    run(scenario)


def test_an_instance_that_dies_as_well_is_left_for_the_next() -> None:
    async def scenario() -> None:
        world = World([7, 1, 2], dies_on_resume={1})  # 7 is gone already
        world.open(request())
        world.lose(0)
        await settle()
        assert [instance for instance, _ in world.resumed] == [2]
        assert world.resumed[0][1].placement_number == 2 * PLACEMENTS_PER_EPOCH
        assert [lost for lost, *_ in world.asked] == [0, 7, 1]

    run(scenario)


def test_an_instance_that_is_about_to_connect_is_not_called_lost() -> None:
    """The scheduler knew it first. Told that it is lost, it would wait for that loss for ever."""

    async def scenario() -> None:
        world = World([9, 1])
        world.open(request())
        world.lose(0)
        await settle()
        assert [lost for lost, *_ in world.asked] == [0, None]
        assert [instance for instance, _ in world.resumed] == [1]

    run(scenario)


def test_an_instance_that_lives_but_cannot_take_it_is_not_called_lost() -> None:
    async def scenario() -> None:
        world = World([1] * 9, fails_on_resume={1})
        world.open(request())
        world.lose(0)
        for _ in range(5):
            await settle()
        assert {lost for lost, *_ in world.asked[1:]} == {None}
        assert "in a row" in world.given_up[0], "it is not tried for ever"

    run(scenario)


def test_copies_elsewhere_are_aborted() -> None:
    async def scenario() -> None:
        world = World([3])
        world.open(request())
        world.routes.arrive("r1", Arrival(2, 1, 5))
        world.lose(0)
        await settle()
        assert world.aborted == [2]

    run(scenario)


def test_a_request_that_instances_die_of_is_given_up() -> None:
    async def scenario() -> None:
        world = World([1] * 9, up=set(range(1, 10)))
        world.open(request())
        instance = 0
        for death in range(MAX_FRUITLESS_RESUMPTIONS + 1):
            assert world.given_up == []
            world.placements = [death + 1]
            world.lose(instance)
            await settle()
            instance = death + 1
        assert len(world.resumed) == MAX_FRUITLESS_RESUMPTIONS
        assert "in a row" in world.given_up[0]

    run(scenario)


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (World([Rejected("no instance took the request", 1.0)]), "no instance took"),
        (World([1], refusal="the grammar refuses"), "the grammar refuses"),
        (World([ValueError("a defect")]), "a defect"),
    ],
)
def test_what_cannot_go_on_ends_with_the_reason(world: World, words: str) -> None:
    async def scenario() -> None:
        world.open(request())
        world.lose(0)
        await settle()
        assert words in world.given_up[0]

    run(scenario)


def test_an_input_without_data_starts_again_only_from_its_beginning() -> None:
    feature = MultiModalFeatureSpec(data=None, modality="image", identifier="i", mm_position=None)  # type: ignore[arg-type]

    async def scenario() -> None:
        begun, waiting = World([1]), World([1])
        begun.open(request(mm_features=[feature]))
        waiting.open(request(mm_features=[feature]), num_tokens=0)
        for world in (begun, waiting):
            world.lose(0)
        await settle()
        assert "image" in begun.given_up[0]
        assert waiting.added == [1]
        parts, _ = waiting.routes.pass_on(1, [Output("r1", [5])])
        assert [o.new_token_ids for part in parts for o in part.outputs] == [[5]]

    run(scenario)


def test_a_client_that_leaves_meanwhile_is_not_resumed() -> None:
    async def scenario() -> None:
        world = World([1])
        world.open(request())
        world.lose(0)
        world.routes.close("r1")
        world.resumer.forget("r1")
        await settle()
        assert world.resumed == []
        assert world.given_up == []

    run(scenario)
