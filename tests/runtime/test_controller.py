"""The global scheduler's host over its real socket, with instances and frontends played by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from llumsched.config import Config, PartConfig
from llumsched.core.events import Event, KvBlocksRemoved, KvBlocksStored, KvCacheCleared
from llumsched.core.load import InstanceLoad, InstanceSpec
from llumsched.core.types import PriorityClass, SchedulingRequest
from llumsched.decision_log import DecisionLog, read_segment, segments_of
from llumsched.runtime import controller as controller_module
from llumsched.runtime.controller import Controller
from llumsched.runtime.messages import (
    ClusterDescription,
    DescribeCluster,
    InstanceGone,
    Message,
    MigrateAnswer,
    MigrateRequest,
    OrderMigration,
    Placed,
    PlaceRequest,
    RegisterInstance,
    ReportLoad,
    ReportMigration,
    ReportPrefixBlocks,
    RequestEnded,
    Unknown,
    Welcomed,
    decode_control,
    encode,
)

TIMEOUT_S = 10.0


@dataclass
class Peer:
    """One connection to the controller."""

    socket: zmq.asyncio.Socket

    async def say(self, message: Message) -> None:
        await self.socket.send(encode(message))

    async def hear(self) -> Any:
        return decode_control(await asyncio.wait_for(self.socket.recv(), TIMEOUT_S))


class Stage:
    """A controller that serves, and the peers that talk to it."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.context = zmq.asyncio.Context()
        self.endpoint = controller.bind(self.context, "127.0.0.1")

    def peer(self) -> Peer:
        socket = self.context.socket(zmq.DEALER)
        socket.linger = 0
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
) -> None:
    async def play() -> None:
        stage = Stage(Controller(config or Config.default("latency"), decision_log=decision_log))
        serving = asyncio.create_task(stage.controller.serve())
        try:
            await asyncio.wait_for(scenario(stage), TIMEOUT_S)
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
        await stranger.say(Welcomed())
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


def test_what_is_decided_is_on_disk_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller_module, "LOG_FLUSH_INTERVAL_S", 0.0)

    async def scenario(stage: Stage) -> None:
        await stage.instance("a")
        frontend = stage.peer()
        await frontend.say(place("r1"))
        await frontend.hear()
        (segment,) = segments_of(tmp_path)
        assert "RequestArrived" in segment.read_text()

    run(scenario, decision_log=tmp_path)


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
