"""The log of the scheduler's process: one line for each move, drain, launch and failure."""

from __future__ import annotations

import logging

import pytest

from llumsched.core.actions import LaunchInstance, PolicyFailed, TerminateInstance
from llumsched.core.events import DrainRequested, InstanceJoined, ScaleRequested, Ticked
from llumsched.core.load import InstanceSpec
from llumsched.scheduler.event_log import SchedulerLog
from llumsched.wire.control import ReportMigration
from tests.builders import STATISTICS, migration_report


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "llumsched")
    return caplog


def report(outcome: str, **more: object) -> ReportMigration:
    return migration_report(
        "m-1",
        request_id="r-1",
        source="instance-0",
        destination="instance-2",
        outcome=outcome,
        **more,
    )


def test_a_move_is_a_line_with_its_ids_and_its_cost(lines: pytest.LogCaptureFixture) -> None:
    SchedulerLog(set).migration_ended(report("committed", statistics=STATISTICS))
    (line,) = lines.messages
    assert line == (
        "Migration m-1 of request r-1 from instance-0 to instance-2: committed; 0.310 s in 3"
        " stages, suspended for 0.021 s, 45 blocks (1.5 MB) over shared_memory"
    )
    said = lines.records[0].__dict__
    assert (said["migration_id"], said["request_id"]) == ("m-1", "r-1")
    assert (said["instance_id"], said["destination_id"]) == ("instance-0", "instance-2")


def test_a_migration_that_found_nothing_to_move_is_quiet(lines: pytest.LogCaptureFixture) -> None:
    SchedulerLog(set).migration_ended(report("nothing_to_move"))
    assert not lines.messages


def test_a_drain_is_said_once_whoever_decides_it(lines: pytest.LogCaptureFixture) -> None:
    draining: set[str] = set()
    log = SchedulerLog(lambda: draining)
    draining.add("instance-1")
    log.handled(DrainRequested(instance_id="instance-1"), ())
    log.handled(Ticked(), ())
    draining.add("instance-0")
    log.handled(Ticked(), ())
    log.handled(DrainRequested(instance_id="instance-0"), ())
    draining.clear()
    log.handled(Ticked(), ())
    draining.add("instance-1")
    log.handled(Ticked(), ())
    assert lines.messages == [
        "Draining instance-1, as asked",
        "Draining instance-0, which the pool can do without",
        "Draining instance-1, which the pool can do without",
    ]


def test_the_drain_of_an_empty_instance_is_said(lines: pytest.LogCaptureFixture) -> None:
    SchedulerLog(set).handled(DrainRequested(instance_id="instance-1"), ())
    assert lines.messages == ["Draining instance-1, as asked"]


def test_what_changes_the_pool_is_said(lines: pytest.LogCaptureFixture) -> None:
    log = SchedulerLog(set)
    spec = InstanceSpec(instance_id="instance-3", num_total_blocks=64, block_size=16)
    log.handled(InstanceJoined(spec=spec, request_ids=("r-1",)), ())
    log.handled(
        ScaleRequested(num_instances=2),
        (
            LaunchInstance(launch_id="launch-1", reason="2 are wanted"),
            TerminateInstance(instance_id="instance-3", reason="drained"),
        ),
    )
    assert lines.messages == [
        "instance-3 has joined, with 64 KV blocks and 1 request",
        "Scaling to 2 instances, as asked",
        "Launching one more instance (launch-1): 2 are wanted",
        "instance-3 may leave: drained",
    ]


def test_a_policy_that_fails_for_every_request_does_not_fill_the_log(
    lines: pytest.LogCaptureFixture,
) -> None:
    log = SchedulerLog(set)
    for _ in range(1000):
        log.handled(Ticked(), (PolicyFailed(policy="Broken", error="KeyError: 'typo'"),))
    assert lines.messages == [
        "Policy Broken failed, and the built-in choice was used: KeyError: 'typo'"
    ]
