"""The global scheduler's host over its real socket, with instances and frontends played by hand."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio
from msgspec.structs import replace as replace_struct

from llumsched.config import Config, PartConfig
from llumsched.core.events import Event, KvBlocksRemoved, KvBlocksStored, KvCacheCleared
from llumsched.core.load import InstanceLoad, InstanceSpec
from llumsched.core.types import PriorityClass, SchedulingRequest
from llumsched.decision_log import DecisionLog, read_segment, segments_of
from llumsched.scheduler.controller import Controller
from llumsched.wire.control import (
    Accepted,
    ClusterDescription,
    DescribeCluster,
    DrainInstance,
    InstanceGone,
    InstanceLeaves,
    LaunchRefused,
    Message,
    MigrateAnswer,
    MigrateRequest,
    OrderLaunch,
    OrderMigration,
    OrderReplacement,
    OrderTermination,
    Placed,
    PlaceRequest,
    RegisterFrontend,
    RegisterInstance,
    ReportLoad,
    ReportMigration,
    ReportPrefixBlocks,
    RequestEnded,
    ScalePool,
    Unknown,
    Welcomed,
    decode_control,
    encode,
)
from llumsched.wire.keys import PoolKeys

TIMEOUT_S = 10.0
KEYS = PoolKeys.generate()


@dataclass
class Peer:
    """One connection to the controller."""

    socket: zmq.asyncio.Socket

    async def say(self, message: Message) -> None:
        await self.socket.send(encode(message))

    async def hear(self) -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            return decode_control(await self.socket.recv())


class Stage:
    """A controller that serves, and the peers that talk to it."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.context = zmq.asyncio.Context()
        self.endpoint = controller.bind(self.context, "127.0.0.1", KEYS)

    def peer(self) -> Peer:
        socket = self.context.socket(zmq.DEALER)
        socket.linger = 0
        KEYS.connect_with(socket)
        socket.connect(self.endpoint)
        return Peer(socket)

    async def instance(self, instance_id: str, index: int = 0) -> Peer:
        peer = self.peer()
        await peer.say(registration(instance_id, index))
        assert isinstance(await peer.hear(), Welcomed)
        await peer.say(ReportLoad(load=load(instance_id)))
        return peer


def registration(instance_id: str, index: int = 0) -> RegisterInstance:
    return RegisterInstance(
        spec=InstanceSpec(instance_id=instance_id, num_total_blocks=100, block_size=32),
        engine_index=index,
        peer_endpoint=f"tcp://{instance_id}",
        fingerprint="same",
    )


def load(instance_id: str, **changes: Any) -> InstanceLoad:
    values: dict[str, Any] = {
        "instance_id": instance_id,
        "sequence": 1,
        "num_total_blocks": 100,
        "num_free_blocks": 100,
    }
    return InstanceLoad(**(values | changes))


def place(request_id: str, **changes: Any) -> PlaceRequest:
    values: dict[str, Any] = {"request_id": request_id, "num_prompt_tokens": 64}
    return PlaceRequest(request=SchedulingRequest(**(values | changes)))


def run(
    scenario: Callable[[Stage], Awaitable[None]],
    *,
    config: Config | None = None,
    decision_log: Path | None = None,
    learning_s: float = 0.0,
    flush_interval_s: float = 1.0,
) -> None:
    async def play() -> None:
        controller = Controller(
            config or Config.default("latency"),
            decision_log=decision_log,
            learning_s=learning_s,
            flush_interval_s=flush_interval_s,
        )
        stage = Stage(controller)
        serving = asyncio.create_task(stage.controller.serve())
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await scenario(stage)
        finally:
            serving.cancel()
            stage.controller.close()
            stage.context.destroy(linger=0)

    asyncio.run(play())


def test_a_request_is_placed_on_a_registered_instance() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.instance("a")
        frontend = stage.peer()
        await frontend.say(place("r1"))
        placed = await frontend.hear()
        assert isinstance(placed, Placed)
        assert (placed.request_id, placed.instance_id) == ("r1", "a")

    run(scenario)


def test_a_request_that_came_before_any_instance_waits_for_one() -> None:
    async def scenario(stage: Stage) -> None:
        frontend = stage.peer()
        await frontend.say(place("r1"))
        await frontend.say(DescribeCluster(call_id=1))
        assert isinstance(await frontend.hear(), ClusterDescription)  # and no placement
        await stage.instance("a")
        placed = await frontend.hear()
        assert isinstance(placed, Placed)
        assert placed.instance_id == "a"

    run(scenario)


def test_why_nothing_can_move_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """In the log at the first such instance, and of each in the description of the pool."""

    async def scenario(stage: Stage) -> None:
        frontend = stage.peer()
        for index, name in enumerate(("a", "b", "b")):
            peer = stage.peer()
            stuck = replace_struct(
                registration(name, index), cannot_migrate="speculative decoding is on"
            )
            await peer.say(stuck)
            assert isinstance(await peer.hear(), Welcomed)
        await frontend.say(DescribeCluster(call_id=1))
        described = await frontend.hear()
        assert [i.cannot_migrate for i in described.instances] == ["speculative decoding is on"] * 2

    with caplog.at_level(logging.WARNING):
        run(scenario)
    (said,) = [r.message for r in caplog.records if "speculative decoding" in r.message]
    assert said.startswith("No request can leave or reach a, nor instances like it")


def test_a_report_of_an_unknown_instance_makes_it_register_again() -> None:
    async def scenario(stage: Stage) -> None:
        instance = stage.peer()
        await instance.say(ReportLoad(load=load("a")))
        assert isinstance(await instance.hear(), Unknown)
        await instance.say(registration("a"))
        assert isinstance(await instance.hear(), Welcomed)

    run(scenario)


def test_an_operators_migration_is_ordered_and_its_report_answered() -> None:
    async def scenario(stage: Stage) -> None:
        a = await stage.instance("a", 0)
        frontend = stage.peer()
        await frontend.say(place("r1"))
        assert (await frontend.hear()).instance_id == "a"
        await stage.instance("b", 1)
        await frontend.say(MigrateRequest(call_id=7, request_id="r1", destination="b"))
        order = await a.hear()
        assert isinstance(order, OrderMigration)
        assert (order.request_id, order.destination) == ("r1", "b")
        assert order.destination_endpoint == "tcp://b"
        report = ReportMigration(
            migration_id=order.migration_id,
            request_id="r1",
            source="a",
            destination="b",
            outcome="committed",
            reason="",
        )
        await a.say(report)
        answer = await frontend.hear()
        assert answer == MigrateAnswer(call_id=7, report=report)

    run(scenario)


def test_migrations_that_moved_nothing_are_counted_by_their_cause() -> None:
    async def scenario(stage: Stage) -> None:
        a = await stage.instance("a", 0)
        for number, cause in enumerate(("multimodal", "no_room", "multimodal")):
            await a.say(
                ReportMigration(
                    migration_id=f"m{number}",
                    request_id="r1",
                    source="a",
                    destination="b",
                    outcome="refused",
                    reason="a sentence",
                    cause=cause,
                )
            )
        await a.say(DescribeCluster(call_id=1))
        described = await a.hear()
        assert isinstance(described, ClusterDescription)
        assert described.migrations == {"refused": 3}
        assert described.migration_causes == {"multimodal": 2, "no_room": 1}

    run(scenario)


@pytest.mark.parametrize(
    ("request_id", "destination", "reason"),
    [("nobody", "a", "nobody"), ("r1", "nowhere", "nowhere"), ("r1", "a", "a")],
)
def test_a_migration_that_cannot_be_is_refused_with_its_reason(
    request_id: str, destination: str, reason: str
) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.instance("a")
        frontend = stage.peer()
        await frontend.say(place("r1"))
        assert (await frontend.hear()).instance_id == "a"
        await frontend.say(
            MigrateRequest(call_id=3, request_id=request_id, destination=destination)
        )
        answer = await frontend.hear()
        assert isinstance(answer, MigrateAnswer)
        assert answer.call_id == 3
        assert answer.refused is not None
        assert reason in answer.refused

    run(scenario)


def test_the_death_of_an_instance_is_told_to_the_others() -> None:
    async def scenario(stage: Stage) -> None:
        a = await stage.instance("a", 0)
        await stage.instance("b", 1)
        stage.controller.instance_lost("b", "killed")
        await stage.controller.flush()
        gone = await a.hear()
        assert gone == InstanceGone(instance_id="b")

    run(scenario)


def test_malformed_messages_are_dropped_and_serving_goes_on() -> None:
    async def scenario(stage: Stage) -> None:
        stranger = stage.peer()
        await stranger.socket.send(b"\xc1 not msgpack")
        await stranger.socket.send_multipart([b"two", b"frames"])
        await stranger.say(Welcomed(scheduler_id="another"))
        await stage.instance("a")
        await stranger.say(place("r1"))
        assert (await stranger.hear()).instance_id == "a"

    run(scenario)


def test_every_event_and_decision_is_in_the_log(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.instance("a")
        frontend = stage.peer()
        await frontend.say(place("r1"))
        await frontend.hear()

    run(scenario, decision_log=tmp_path)
    (segment,) = segments_of(tmp_path)
    _, decisions = read_segment(segment)
    kinds = [type(decision.event).__name__ for decision in decisions]
    assert [kind for kind in kinds if kind != "Ticked"] == [
        "InstanceJoined",
        "LoadReported",
        "RequestArrived",
    ]


def test_what_is_decided_is_on_disk_before_the_end(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.instance("a")
        frontend = stage.peer()
        await frontend.say(place("r1"))
        await frontend.hear()
        (segment,) = segments_of(tmp_path)
        assert "RequestArrived" in segment.read_text()

    run(scenario, decision_log=tmp_path, flush_interval_s=0.0)


def test_a_full_disk_ends_the_log_and_not_the_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DecisionLog, "write", full)

    async def scenario(stage: Stage) -> None:
        await stage.instance("a")
        frontend = stage.peer()
        await frontend.say(place("r1"))
        assert (await frontend.hear()).instance_id == "a"

    run(scenario, decision_log=tmp_path)


def test_a_request_goes_to_the_instance_that_caches_its_prefix() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.instance("a")
        b = await stage.instance("b", 1)
        frontend = stage.peer()
        events: list[Event] = [
            KvBlocksStored(instance_id="b", block_hashes=(1, 2**64 - 1, 3)),
            KvBlocksRemoved(instance_id="b", block_hashes=(3,)),
        ]
        await b.say(ReportPrefixBlocks.of("b", events))
        # Its answer says that what was sent before has been taken in.
        await b.say(registration("b", 1))
        assert isinstance(await b.hear(), Welcomed)
        for number in range(3):
            await frontend.say(place(f"r{number}", prefix_hashes=(1, 2**64 - 1, 3)))
            placed = await frontend.hear()
            assert (placed.instance_id, "2 of 3" in placed.reason) == ("b", True)
        # Once it is gone from there, the instance does not matter any more.
        await b.say(ReportPrefixBlocks.of("b", [KvCacheCleared(instance_id="b")]))
        await b.say(registration("b", 1))
        assert isinstance(await b.hear(), Welcomed)
        await frontend.say(place("r9", prefix_hashes=(1, 2**64 - 1, 3)))
        assert "nothing cached" in (await frontend.hear()).reason

    run(scenario, config=Config.default("prefix_aware"))


def test_lengths_are_learned_and_predictions_go_along() -> None:
    config = replace(
        Config.default("latency"),
        parts={"predictor": PartConfig(name="moving_quantile", params={"min_samples": 1})},
    )

    async def scenario(stage: Stage) -> None:
        await stage.instance("a")
        frontend = stage.peer()
        await frontend.say(place("r1", client_id="c"))
        assert (await frontend.hear()).predicted_output_tokens is None
        await frontend.say(RequestEnded(request_id="r1", aborted=False, num_output_tokens=23))
        await frontend.say(place("r2", client_id="c"))
        assert (await frontend.hear()).predicted_output_tokens == 23
        # How far an aborted one would have gone is not known.
        await frontend.say(RequestEnded(request_id="r2", aborted=True, num_output_tokens=1))
        await frontend.say(place("r3", client_id="c"))
        assert (await frontend.hear()).predicted_output_tokens == 23

    run(scenario, config=config)


def test_held_requests_are_described_by_class() -> None:
    async def scenario(stage: Stage) -> None:
        frontend = stage.peer()
        await frontend.say(place("r1", scheduling_priority=PriorityClass.HIGH))
        await frontend.say(place("r2"))
        await frontend.say(place("r3"))
        await frontend.say(DescribeCluster(call_id=1))
        assert (await frontend.hear()).queued == {"high": 1, "normal": 2}

    run(scenario)


# ---- instances that come and go ------------------------------------------------------------------


async def supervisor(stage: Stage, **registration: Any) -> Peer:
    """A frontend that starts and ends instances."""
    peer = stage.peer()
    await peer.say(RegisterFrontend(frontend_id="f", supervises=True, **registration))
    assert isinstance(await peer.hear(), Welcomed)
    return peer


def test_what_boots_in_the_place_of_others_is_waited_for() -> None:
    """A request that comes meanwhile is held beyond the time that requests are held."""
    config = Config.default("latency")
    config = replace(config, scheduler={**config.scheduler, "queue_timeout_s": 0.2})

    async def scenario(stage: Stage) -> None:
        await supervisor(stage, num_replacing=1)
        frontend = stage.peer()
        await frontend.say(place("r"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.6):
                await frontend.socket.recv()
        await stage.instance("a", 5)
        assert (await frontend.hear()).instance_id == "a"

    run(scenario, config=config)


def test_a_placement_is_answered_again_when_it_is_asked_for_again() -> None:
    """Its answer may have been lost with a scheduler, or on its way."""

    async def scenario(stage: Stage) -> None:
        await stage.instance("a", 5)
        frontend = stage.peer()
        for _ in range(2):
            await frontend.say(place("r1"))
            placed = await frontend.hear()
            assert (placed.instance_id, placed.engine_index) == ("a", 5)

    run(scenario)


def test_a_request_of_a_dead_instance_is_placed_again_whoever_hears_of_it_first() -> None:
    async def scenario(stage: Stage) -> None:
        frontend = stage.peer()
        await stage.instance("a", 0)
        for request_id in ("r1", "r2"):
            await frontend.say(place(request_id))
            assert (await frontend.hear()).instance_id == "a"
        lost = place("r1")
        # The frontend is first: the scheduler still believes in the instance, and must not name it.
        await frontend.say(PlaceRequest(request=lost.request, lost="a", has_begun=True))
        await stage.instance("b", 1)
        stage.controller.instance_lost("a", "killed")
        await stage.controller.flush()
        placed = {(p.request_id, p.instance_id) for p in [await frontend.hear() for _ in range(2)]}
        assert placed == {("r1", "b"), ("r2", "b")}
        # The scheduler was first: the frontend hears the same again.
        await frontend.say(PlaceRequest(request=place("r2").request, lost="a", has_begun=True))
        assert (await frontend.hear()).instance_id == "b"

    run(scenario)


def test_a_request_that_has_begun_is_not_turned_away() -> None:
    """A scheduler that was just started knows neither the request nor, yet, an instance."""

    async def scenario(stage: Stage) -> None:
        frontend = stage.peer()
        await frontend.say(
            PlaceRequest(request=place("begun").request, lost="gone", has_begun=True)
        )
        await frontend.say(place("new"))
        rejected = await frontend.hear()
        assert (rejected.request_id, rejected.instance_id) == ("new", None)
        await stage.instance("a")
        assert (await frontend.hear()).request_id == "begun"

    config = Config(
        policy="latency",
        scheduler={"max_queued_requests": 0},
    )
    run(scenario, config=config)


def test_a_drained_instance_is_ended_when_it_is_empty() -> None:
    async def scenario(stage: Stage) -> None:
        a = await stage.instance("a")
        frontend = await supervisor(stage)
        await frontend.say(place("r1"))
        assert (await frontend.hear()).instance_id == "a"
        await frontend.say(DrainInstance(call_id=1, instance_id="a"))
        assert await frontend.hear() == Accepted(call_id=1)
        await frontend.say(RequestEnded(request_id="r1", aborted=False))
        await a.say(ReportLoad(load=load("a", sequence=2)))
        order = await frontend.hear()
        assert isinstance(order, OrderTermination)
        assert order.instance_id == "a"
        # Whoever carries it out may have been away: it is told again until the instance is lost.
        again = await supervisor_again(stage)
        assert isinstance(await again.hear(), OrderTermination)

    async def supervisor_again(stage: Stage) -> Peer:
        peer = stage.peer()
        await peer.say(RegisterFrontend(frontend_id="f", supervises=True))
        return peer

    run(scenario)


def test_only_an_instance_that_is_there_can_be_drained() -> None:
    async def scenario(stage: Stage) -> None:
        frontend = await supervisor(stage)
        await frontend.say(DrainInstance(call_id=1, instance_id="nowhere"))
        answer = await frontend.hear()
        assert "nowhere" in answer.refused

    run(scenario)


async def state_of(frontend: Peer, instance_id: str) -> str:
    await frontend.say(DescribeCluster(call_id=99))
    while not isinstance(answer := await frontend.hear(), ClusterDescription):
        pass
    return next(i.state for i in answer.instances if i.instance_id == instance_id)


async def report_busy(stage: Stage, instance: Peer, instance_id: str) -> None:
    """It runs a request, and the scheduler knows."""
    busy = load(instance_id, sequence=2, num_running=1, num_free_blocks=9)
    await instance.say(ReportLoad(load=busy))
    observer = stage.peer()
    while True:
        await observer.say(DescribeCluster(call_id=1))
        described = await observer.hear()
        if any(i.load == busy for i in described.instances):
            return


def test_a_scheduler_that_restarts_is_told_what_is_being_drained() -> None:
    async def scenario(stage: Stage) -> None:
        a = await stage.instance("a")
        await report_busy(stage, a, "a")
        frontend = await supervisor(stage, draining=("a", "gone"))
        assert await state_of(frontend, "a") == "draining"

    run(scenario)


def test_an_instance_whose_machine_goes_is_drained() -> None:
    async def scenario(stage: Stage) -> None:
        a = await stage.instance("a")
        await report_busy(stage, a, "a")
        frontend = await supervisor(stage)
        await a.say(InstanceLeaves(instance_id="a"))
        assert await frontend.hear() == OrderReplacement(instance_id="a"), "nobody wants fewer"
        assert await state_of(frontend, "a") == "draining"

    run(scenario)


def test_nobody_is_drained_nor_scaled_before_it_is_known_what_there_is() -> None:
    """A scheduler that has just been started would launch a whole pool beside the one there is."""

    async def scenario(stage: Stage) -> None:
        await stage.instance("a")
        frontend = stage.peer()
        await frontend.say(ScalePool(call_id=1, num_instances=2))
        await frontend.say(DrainInstance(call_id=2, instance_id="a"))
        assert await state_of(frontend, "a") == "serving", "asked again in a second"

    run(scenario)


def test_a_scheduler_that_has_just_started_launches_nothing_that_may_be_there_already() -> None:
    """A request that it is asked to place anew comes before the instances have registered."""

    async def scenario(stage: Stage) -> None:
        frontend = await supervisor(stage)
        await frontend.say(place("r1"))
        await frontend.say(ScalePool(call_id=1, num_instances=2))
        await stage.instance("a")
        assert (await frontend.hear()).instance_id == "a", "no order, no word of the operator's"

    config = Config(policy="latency", scheduler={"max_instances": 2, "min_instances": 0})
    run(scenario, config=config, learning_s=TIMEOUT_S)


def test_a_request_that_finds_no_instance_has_one_ordered() -> None:
    async def scenario(stage: Stage) -> None:
        frontend = await supervisor(stage)
        await frontend.say(place("r1"))
        order = await frontend.hear()
        assert isinstance(order, OrderLaunch)
        a = stage.peer()
        await a.say(replace_struct(registration("a"), launch_id=order.launch_id))
        assert (await frontend.hear()).instance_id == "a"

    config = Config(policy="latency", scheduler={"max_instances": 2, "min_instances": 0})
    run(scenario, config=config)


def test_instances_are_ordered_until_there_are_as_many_as_asked_for() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.instance("a")
        frontend = await supervisor(stage)
        await frontend.say(ScalePool(call_id=1, num_instances=3))
        answers = [await frontend.hear() for _ in range(3)]
        orders = [o for o in answers if isinstance(o, OrderLaunch)]
        assert len(orders) == 2
        assert Accepted(call_id=1) in answers
        await frontend.say(LaunchRefused(launch_id=orders[0].launch_id, reason="no room"))
        b = stage.peer()
        await b.say(replace_struct(registration("b", 1), launch_id=orders[1].launch_id))
        assert isinstance(await b.hear(), Welcomed)
        await frontend.say(ScalePool(call_id=2, num_instances=3))
        answers = [await frontend.hear() for _ in range(2)]
        assert sum(isinstance(o, OrderLaunch) for o in answers) == 1, "one came, one never will"

    run(scenario)


def test_an_instance_that_registers_names_the_requests_it_holds() -> None:
    """As to a scheduler that has just been started: it places them anew when the instance dies."""

    async def scenario(stage: Stage) -> None:
        a = stage.peer()
        await a.say(replace_struct(registration("a"), request_ids=("r1",)))
        assert isinstance(await a.hear(), Welcomed)
        frontend = stage.peer()
        await frontend.say(place("r1"))
        assert (await frontend.hear()).instance_id == "a", "known without having been placed"

    run(scenario)


def test_an_operator_is_told_that_the_source_died() -> None:
    async def scenario(stage: Stage) -> None:
        a = await stage.instance("a", 0)
        frontend = stage.peer()
        await frontend.say(place("r1"))
        assert (await frontend.hear()).instance_id == "a"
        await stage.instance("b", 1)
        await frontend.say(MigrateRequest(call_id=7, request_id="r1", destination="b"))
        assert isinstance(await a.hear(), OrderMigration)
        stage.controller.instance_lost("a", "killed")
        await stage.controller.flush()
        answers = [await frontend.hear() for _ in range(2)]
        (answer,) = (m for m in answers if isinstance(m, MigrateAnswer))
        assert answer.call_id == 7
        assert "instance a was lost" in (answer.refused or "")

    run(scenario)


def test_the_scaling_policy_orders_instances() -> None:
    async def scenario(stage: Stage) -> None:
        frontend = await supervisor(stage)
        a = await stage.instance("a")
        await a.say(ReportLoad(load=load("a", sequence=2, num_running=9, num_free_blocks=1)))
        order = await frontend.hear()
        assert isinstance(order, OrderLaunch)

    config = Config(
        policy="latency",
        scheduler={"max_instances": 2, "scaling_interval_s": 0.01, "scale_up_after_s": 0.0},
    )
    run(scenario, config=config)


def test_a_frontend_that_dies_is_forgotten_with_all_it_has() -> None:
    """What runs, and what it had sent though nobody had read it yet."""

    async def scenario(stage: Stage) -> None:
        await stage.instance("a")
        dying, other = stage.peer(), stage.peer()
        for peer, name in ((dying, "frontend-0"), (other, "frontend-1")):
            await peer.say(RegisterFrontend(frontend_id=name))
            assert isinstance(await peer.hear(), Welcomed)
            await peer.say(place(f"of {name}"))
            assert isinstance(await peer.hear(), Placed)
        stage.controller.frontend_lost("frontend-0", [])
        await dying.say(place("sent before it died"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await dying.socket.recv()
        known = [await is_known(other, name) for name in ("of frontend-0", "sent before it died")]
        assert known == [False, False]
        assert await is_known(other, "of frontend-1")

    run(scenario)


def test_a_scheduler_that_was_started_again_learns_from_instances_whose_requests_end() -> None:
    async def scenario(stage: Stage) -> None:
        instance, frontend = stage.peer(), stage.peer()
        await instance.say(replace_struct(registration("a"), request_ids=("r",)))
        assert isinstance(await instance.hear(), Welcomed)
        assert await is_known(frontend, "r")
        stage.controller.frontend_lost("frontend-0", ["r"])
        assert not await is_known(frontend, "r")

    run(scenario)


async def is_known(frontend: Peer, request_id: str) -> bool:
    """Whether the scheduler has the request: one that it has not cannot be moved for that."""
    await frontend.say(MigrateRequest(call_id=1, request_id=request_id, destination="nowhere"))
    answer = await frontend.hear()
    assert isinstance(answer, MigrateAnswer)
    assert answer.refused is not None
    return "nowhere" in answer.refused


def test_a_frontend_in_the_place_of_a_dead_one_is_served() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.instance("a")
        first, second = stage.peer(), stage.peer()
        await first.say(RegisterFrontend(frontend_id="frontend-0"))
        assert isinstance(await first.hear(), Welcomed)
        stage.controller.frontend_lost("frontend-0", [])
        await second.say(RegisterFrontend(frontend_id="frontend-0"))
        assert isinstance(await second.hear(), Welcomed)
        await second.say(place("r"))
        assert isinstance(await second.hear(), Placed)

    run(scenario)
