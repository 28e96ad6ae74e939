"""The controller as instances come, drain, die and are ordered, and as frontends do."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from msgspec.structs import replace as replace_struct

from llumsched.config import Config
from llumsched.wire.control import (
    Accepted,
    ClusterDescription,
    DescribeCluster,
    DrainInstance,
    InstanceLeaves,
    LaunchRefused,
    MigrateAnswer,
    MigrateRequest,
    OrderLaunch,
    OrderMigration,
    OrderReplacement,
    OrderTermination,
    Placed,
    PlaceRequest,
    RegisterFrontend,
    ReportLoad,
    RequestEnded,
    ScalePool,
    Welcomed,
)
from tests.scheduler.stage import TIMEOUT_S, Peer, Stage, load, place, registration, run

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
    """The first answer may have been lost with a scheduler, or on its way."""

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
    """An instance runs a request, and the scheduler knows."""
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
    """All is forgotten that runs, and all that was sent though nobody had read it yet."""

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
    """True if the scheduler has the request: one that it has not cannot be moved for that."""
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
