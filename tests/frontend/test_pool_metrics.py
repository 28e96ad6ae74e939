"""The scheduler's knowledge of the pool, as a scrape sees it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any, cast

import msgspec
from prometheus_client import CollectorRegistry

from llumsched.core.load import InstanceLoad
from llumsched.frontend.http.pool_metrics import (
    PoolMetrics,
    families,
    fragmented_blocks,
    freeness_spread,
)
from llumsched.frontend.routing.engine_labels import EngineLabels
from llumsched.frontend.routing.scheduler_client import SchedulerClient, SchedulerUnavailable
from llumsched.metrics import CATALOGUE, Where
from llumsched.wire.control import ClusterDescription, InstanceDescription


def instance(
    *,
    instance_id: str = "instance-3",
    state: str = "serving",
    freeness: float | None = 20.0,
    **changes: Any,
) -> InstanceDescription:
    values: dict[str, Any] = {
        "instance_id": instance_id,
        "sequence": 1,
        "num_total_blocks": 100,
        "num_free_blocks": 60,
        "num_reserved_blocks": 10,
        "num_running": 3,
        "num_waiting": 1,
    }
    return InstanceDescription(
        instance_id=instance_id,
        state=state,
        role="mixed",
        freeness=freeness,
        report_age_s=0.1,
        load=InstanceLoad(**(values | changes)),
    )


def description(**changes: Any) -> ClusterDescription:
    values: dict[str, Any] = {
        "call_id": 1,
        "policy": "latency",
        "instances": [instance()],
        "migrations": {"committed": 4},
        "migration_causes": {"multimodal": 3},
        "queued": {"high": 2},
        "policy_failures": {"Mine": 1},
        "unproven": {"scheduler": 1},
    }
    return ClusterDescription(**(values | changes))


class PeerConnection:
    """Answers each call with the next of its answers, the last again and again; ``None`` is
    silence. ``done`` is set by who asks once more: the last answer has been taken in."""

    def __init__(self, answers: Sequence[ClusterDescription | None]) -> None:
        self.answers = [*answers, answers[-1]]
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
        labels = EngineLabels(4)
        labels.take(3, 1)
        metrics = PoolMetrics(lambda: {"frontend": 2}, labels, registry, refresh_interval_s=0.001)
        link = PeerConnection(answers)
        following = asyncio.create_task(metrics.follow(cast("SchedulerClient", link)))
        async with asyncio.timeout(5):
            await link.done.wait()
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
    assert values["llumsched_migrations_not_moved_total", ("multimodal",)] == 3
    assert values["llumsched_queued_requests", ("high",)] == 2
    assert values["llumsched_queued_requests", ("normal",)] == 0
    assert values["llumsched_instances", ("serving",)] == 1
    assert values["llumsched_instances", ("draining",)] == 0
    assert values["llumsched_instance_freeness", ("instance-3",)] == 20
    blocks = {
        kind: values["llumsched_instance_blocks", ("instance-3", kind)]
        for kind in ("free", "reserved", "used")
    }
    assert blocks == {"free": 60, "reserved": 10, "used": 30}
    assert sum(blocks.values()) == 100
    assert values["llumsched_instance_requests", ("instance-3", "running")] == 3
    assert values["llumsched_instance_requests", ("instance-3", "waiting")] == 1
    assert values["llumsched_instance_can_migrate", ("instance-3",)] == 1
    assert values["llumsched_unproven_connections", ("scheduler",)] == 1


def test_an_instance_that_no_request_can_leave() -> None:
    stuck = msgspec.structs.replace(instance(), cannot_migrate="speculative decoding is on")
    values = scraped(description(instances=[stuck]))
    assert values["llumsched_instance_can_migrate", ("instance-3",)] == 0


def test_every_metric_of_the_pool_is_shown() -> None:
    there = {name for name, _ in scraped(description())}
    wanted = {spec.exposed_name for spec in CATALOGUE if spec.where is Where.POOL}
    assert wanted <= there


def shown(cluster: ClusterDescription | None, unproven: int) -> dict[str, set[Any]]:
    """The samples of each metric, labels and values."""
    found: dict[str, set[Any]] = {}
    for family in families(cluster, {3: 1}, {"frontend": unproven}):
        for sample in family.samples:
            key = (*sample.labels.values(), sample.value)
            found.setdefault(sample.name, set()).add(key)
    return found


def test_every_metric_of_the_pool_follows_what_it_tells_of() -> None:
    idle = shown(description(queued={}, instances=[instance()]), 0)
    moved = instance(
        state="draining",
        freeness=2.0,
        num_free_blocks=4,
        num_running=9,
        num_migrations_out=1,
        step_time_s=0.05,
    )
    moved = msgspec.structs.replace(moved, report_age_s=3.0, cannot_migrate="it speculates")
    starved = instance(
        instance_id="instance-4", num_free_blocks=1, num_waiting=1, head_of_line_blocks=20
    )
    others = [instance(instance_id="instance-5", freeness=40.0), starved]
    busy = shown(description(policy="slo", instances=[moved, *others]), 7)
    busy["llumsched_scheduler_up"] |= shown(None, 0)["llumsched_scheduler_up"]
    for spec in CATALOGUE:
        if spec.where is Where.POOL:
            assert idle[spec.exposed_name] != busy[spec.exposed_name], spec.name


def test_an_instance_can_be_matched_to_its_engine_label() -> None:
    """vLLM's metrics have the label alone, which follows the order of booting."""
    values = scraped(description())
    identity = ("instance-3", "1", "mixed", "serving", "latency")
    assert values["llumsched_instance_info", identity] == 1


def test_no_value_is_infinite() -> None:
    idle = instance(freeness=None, num_running=0, num_free_blocks=100)
    drains = instance(instance_id="instance-4", state="draining", freeness=None)
    values = scraped(description(instances=[idle, drains]))
    assert all(math.isfinite(value) for value in values.values())
    assert values["llumsched_instance_freeness", ("instance-3",)] == 100
    assert ("llumsched_instance_freeness", ("instance-4",)) not in values


def test_imbalance_is_the_spread_of_freeness_of_those_that_serve() -> None:
    pool = [
        instance(freeness=5.0),
        instance(freeness=-20.0),
        instance(freeness=None, num_free_blocks=90),
        instance(state="draining", freeness=None),
    ]
    assert freeness_spread(pool) == 110.0
    assert freeness_spread(pool[:1]) == 0.0
    assert freeness_spread([]) == 0.0


def test_fragmentation_is_what_others_have_of_what_the_first_in_line_need() -> None:
    waits = instance(num_free_blocks=4, num_waiting=1, head_of_line_blocks=20)
    assert fragmented_blocks([waits]) == 0
    assert fragmented_blocks([waits, instance(num_free_blocks=10)]) == 10
    assert fragmented_blocks([waits, instance(num_free_blocks=50)]) == 16
    fits = instance(num_free_blocks=30, num_waiting=1, head_of_line_blocks=20)
    assert fragmented_blocks([fits, instance(num_free_blocks=50)]) == 0


def test_what_a_silent_scheduler_knew_is_not_shown() -> None:
    values = scraped(description(unproven={"instance-3": 5}), None)
    names = {name for name, _ in values}
    assert names == {
        "llumsched_scheduler_up",
        "llumsched_unproven_connections",
        "llumsched_build_info",
    }
    assert values["llumsched_scheduler_up", ()] == 0
    assert values["llumsched_unproven_connections", ("frontend",)] == 2
