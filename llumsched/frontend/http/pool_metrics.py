"""The pool as the scheduler sees it, for ``/metrics``: what a dashboard of the cluster needs.

The scheduler lives in another process, so its last description is kept here and asked for anew
every few seconds; a scrape never waits for it. While the scheduler is silent
``llumsched_scheduler_up`` is 0 and what it knew last is not shown, as it may not hold any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from llumsched.frontend.routing.scheduler_client import SchedulerClient, SchedulerUnavailable
from llumsched.wire.control import ClusterDescription, InstanceDescription

REFRESH_INTERVAL_S = 2.0
REFRESH_TIMEOUT_S = 2.0


class PoolMetrics:
    """A collector of ``prometheus_client``; ``follow`` keeps it up to date.

    Args:
        unproven: counts what the gates of processes have turned away, by process; of those that
            the scheduler does not hear of.
    """

    def __init__(
        self,
        unproven: Callable[[], Mapping[str, int]],
        registry: CollectorRegistry = REGISTRY,
        refresh_interval_s: float = REFRESH_INTERVAL_S,
    ) -> None:
        self._refresh_interval_s = refresh_interval_s
        self._unproven = unproven
        self._registry = registry
        self._last: ClusterDescription | None = None
        registry.register(self)

    async def follow(self, link: SchedulerClient) -> None:
        """Ask the scheduler again and again, until cancelled."""
        try:
            while True:
                try:
                    self._last = await link.describe(REFRESH_TIMEOUT_S)
                except SchedulerUnavailable:
                    self._last = None
                await asyncio.sleep(self._refresh_interval_s)
        finally:
            self._registry.unregister(self)

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment; called by the registry."""
        cluster = self._last
        known = cluster.unproven if cluster is not None else {}
        yield _unproven({**self._unproven(), **known})
        yield GaugeMetricFamily(
            "llumsched_scheduler_up",
            "1 while the global scheduler answers.",
            value=float(cluster is not None),
        )
        if cluster is None:
            return
        yield _counter(
            "llumsched_migrations",
            "Migrations that ended, by outcome.",
            "outcome",
            cluster.migrations,
        )
        yield _counter(
            "llumsched_migrations_not_moved",
            "Migrations that were refused or given up, by cause.",
            "cause",
            cluster.migration_causes,
        )
        yield _counter(
            "llumsched_policy_failures",
            "Decisions in which a policy raised or answered nonsense.",
            "policy",
            cluster.policy_failures,
        )
        queued = GaugeMetricFamily(
            "llumsched_queued_requests",
            "Requests the scheduler holds, by priority class.",
            labels=("priority_class",),
        )
        for priority_class, num_queued in {"normal": 0, "high": 0, **cluster.queued}.items():
            queued.add_metric((priority_class,), num_queued)
        yield queued
        yield from _instances(cluster.instances)


def _unproven(by_process: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(
        "llumsched_unproven_connections",
        "Connections since its start that have not proved to be the pool's own.",
        labels=("process",),
    )
    for process, num_unauthenticated in sorted(by_process.items()):
        family.add_metric((process,), num_unauthenticated)
    return family


def _counter(name: str, help_: str, label: str, values: dict[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help_, labels=(label,))
    for value, count in sorted(values.items()):
        family.add_metric((value,), count)
    return family


def _instances(instances: list[InstanceDescription]) -> Iterator[Metric]:
    freeness = GaugeMetricFamily(
        "llumsched_instance_freeness",
        "Free KV blocks for each running request; +Inf when empty, -Inf when draining.",
        labels=("instance", "state"),
    )
    blocks = GaugeMetricFamily(
        "llumsched_instance_blocks",
        "KV blocks: free, reserved for arriving requests, used by its own.",
        labels=("instance", "kind"),
    )
    requests = GaugeMetricFamily(
        "llumsched_instance_requests", "Requests on it.", labels=("instance", "status")
    )
    report_age = GaugeMetricFamily(
        "llumsched_instance_report_age_seconds",
        "Since its last load report.",
        labels=("instance",),
    )
    can_migrate = GaugeMetricFamily(
        "llumsched_instance_can_migrate",
        "1 if requests can leave and reach it; the status command says why they cannot.",
        labels=("instance",),
    )
    for instance in instances:
        name = instance.instance_id
        can_migrate.add_metric((name,), float(not instance.cannot_migrate))
        if instance.freeness is not None:
            value = instance.freeness
        else:
            value = float("-inf" if instance.state == "draining" else "inf")
        freeness.add_metric((name, instance.state), value)
        if instance.report_age_s is not None:
            report_age.add_metric((name,), instance.report_age_s)
        load = instance.load
        if load is None:
            continue
        blocks.add_metric((name, "free"), load.num_free_blocks)
        blocks.add_metric((name, "reserved"), load.num_reserved_blocks)
        blocks.add_metric((name, "used"), load.num_used_blocks - load.num_reserved_blocks)
        requests.add_metric((name, "running"), load.num_running)
        requests.add_metric((name, "waiting"), load.num_waiting)
    yield from (freeness, blocks, requests, report_age, can_migrate)
