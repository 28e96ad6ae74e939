"""What the scheduler knows of the pool, as a scrape sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from llumsched.core.load import InstanceLoad
from llumsched.frontend.http.pool_metrics import PoolMetrics
from llumsched.frontend.routing.scheduler_client import SchedulerClient, SchedulerUnavailable
from llumsched.wire.control import ClusterDescription, InstanceDescription


def description(**changes: Any) -> ClusterDescription:
    load = InstanceLoad(
        instance_id="a",
        sequence=1,
        num_total_blocks=100,
        num_free_blocks=60,
        num_reserved_blocks=10,
        num_running=3,
        num_waiting=1,
    )
    instance = InstanceDescription(
        instance_id="a", state="serving", role="mixed", freeness=20.0, report_age_s=0.1, load=load
    )
    values: dict[str, Any] = {
        "call_id": 1,
        "policy": "latency",
        "instances": [instance],
        "migrations": {"committed": 4},
        "migration_causes": {"multimodal": 3},
        "queued": {"high": 2},
        "policy_failures": {"Mine": 1},
        "unproven": {"scheduler": 1},
    }
    return ClusterDescription(**(values | changes))


class PeerConnection:
    """Answers each call with the next of its answers; ``None`` is silence."""

    def __init__(self, answers: Sequence[ClusterDescription | None]) -> None:
        self.answers = list(answers)
        self.done = asyncio.Event()

    async def describe(self, timeout_s: float) -> ClusterDescription:
        if len(self.answers) == 1:
            self.done.set()
        answer = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
        if answer is None:
            raise SchedulerUnavailable("silent")
        return answer


def scraped(*answers: ClusterDescription | None) -> Any:
    """The value of a metric after the last of the answers, and the registry afterwards."""
    registry = CollectorRegistry()

    async def follow() -> dict[tuple[str, tuple[str, ...]], float]:
        metrics = PoolMetrics(lambda: {"frontend": 2}, registry, refresh_interval_s=0.001)
        link = PeerConnection(answers)
        following = asyncio.create_task(metrics.follow(cast("SchedulerClient", link)))
        async with asyncio.timeout(5):
            await link.done.wait()
        await asyncio.sleep(0.01)
        values = {
            (sample.name, tuple(sample.labels.values())): sample.value
            for family in registry.collect()
            for sample in family.samples
        }
        following.cancel()
        await asyncio.wait([following])
        assert not list(registry.collect()), "still registered"
        return values

    return asyncio.run(follow())


def test_the_pool() -> None:
    values = scraped(description())
    assert values["llumsched_scheduler_up", ()] == 1
    assert values["llumsched_migrations_total", ("committed",)] == 4
    assert values["llumsched_migrations_not_moved_total", ("multimodal",)] == 3
    assert values["llumsched_policy_failures_total", ("Mine",)] == 1
    assert values["llumsched_queued_requests", ("high",)] == 2
    assert values["llumsched_queued_requests", ("normal",)] == 0
    assert values["llumsched_instance_freeness", ("a", "serving")] == 20
    blocks = {
        kind: values["llumsched_instance_blocks", ("a", kind)]
        for kind in ("free", "reserved", "used")
    }
    assert blocks == {"free": 60, "reserved": 10, "used": 30}
    assert sum(blocks.values()) == 100
    assert values["llumsched_instance_requests", ("a", "running")] == 3
    assert values["llumsched_instance_requests", ("a", "waiting")] == 1
    assert values["llumsched_instance_can_migrate", ("a",)] == 1
    assert values["llumsched_unproven_connections", ("scheduler",)] == 1


def test_an_instance_that_no_request_can_leave() -> None:
    (instance,) = description().instances
    stuck = msgspec.structs.replace(instance, cannot_migrate="speculative decoding is on")
    values = scraped(description(instances=[stuck]))
    assert values["llumsched_instance_can_migrate", ("a",)] == 0


@pytest.mark.parametrize(
    ("state", "freeness"), [("serving", float("inf")), ("draining", float("-inf"))]
)
def test_freeness_of_an_empty_or_draining_instance(state: str, freeness: float) -> None:
    instance = InstanceDescription(
        instance_id="a", state=state, role="mixed", freeness=None, report_age_s=None, load=None
    )
    values = scraped(description(instances=[instance]))
    assert values["llumsched_instance_freeness", ("a", state)] == freeness


def test_what_a_silent_scheduler_knew_is_not_shown() -> None:
    assert scraped(description(unproven={"a": 5}), None) == {
        ("llumsched_scheduler_up", ()): 0,
        ("llumsched_unproven_connections", ("frontend",)): 2,
    }
