"""The global scheduler's host over its real socket, with instances and frontends played by hand."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace as replace_struct

from llumsched.config import Config, PartConfig
from llumsched.core.events import Event, KvBlocksRemoved, KvBlocksStored, KvCacheCleared
from llumsched.core.types import PriorityClass
from llumsched.decision_log import DecisionLog, read_segment, segments_of
from llumsched.wire.control import (
    ClusterDescription,
    DescribeCluster,
    InstanceGone,
    MigrateAnswer,
    MigrateRequest,
    OrderMigration,
    Placed,
    ReportLoad,
    ReportPrefixBlocks,
    RequestEnded,
    Unknown,
    Welcomed,
)
from tests.builders import migration_report
from tests.scheduler.stage import Stage, load, place, registration, run


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
        report = migration_report(order.migration_id)
        await a.say(report)
        answer = await frontend.hear()
        assert answer == MigrateAnswer(call_id=7, report=report)

    run(scenario)


def test_migrations_that_moved_nothing_are_counted_by_their_cause() -> None:
    async def scenario(stage: Stage) -> None:
        a = await stage.instance("a", 0)
        for number, cause in enumerate(("multimodal", "no_room", "multimodal")):
            await a.say(
                migration_report(f"m{number}", outcome="refused", reason="a sentence", cause=cause)
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
    before_s = time.time()

    async def scenario(stage: Stage) -> None:
        await stage.instance("a")
        frontend = stage.peer()
        await frontend.say(place("r1"))
        await frontend.hear()

    run(scenario, decision_log=tmp_path)
    (segment,) = segments_of(tmp_path)
    _, found = read_segment(segment)
    decisions = list(found)
    kinds = [type(decision.event).__name__ for decision in decisions]
    assert [kind for kind in kinds if kind != "Ticked"] == [
        "InstanceJoined",
        "LoadReported",
        "RequestArrived",
    ]
    # With the time of day, by which other logs and boards are found.
    times_s = [decision.unix_s for decision in decisions if decision.unix_s is not None]
    assert before_s <= times_s[0] <= times_s[-1] <= time.time()


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
