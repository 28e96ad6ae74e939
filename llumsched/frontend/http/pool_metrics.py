"""The pool as the scheduler sees it, for ``/metrics``: what a dashboard of the cluster needs.

The scheduler lives in another process, so its last description is kept here and asked for anew
every few seconds; a scrape never waits for it. While the scheduler is silent
``llumsched_scheduler_up`` is 0 and what it knew last is not shown, as it may not hold any more.
"""

from __future__ import annotations

import asyncio
import functools
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, Metric

from llumsched import __version__, metrics
from llumsched.frontend.routing.engine_labels import EngineLabels
from llumsched.frontend.routing.scheduler_client import SchedulerClient, SchedulerUnavailable
from llumsched.wire.control import ClusterDescription, InstanceDescription
from llumsched.wire.names import engine_index

REFRESH_INTERVAL_S = 2.0
REFRESH_TIMEOUT_S = 2.0


class PoolMetrics:
    """A collector of ``prometheus_client``; ``follow`` keeps it up to date.

    Args:
        unproven: counts what the gates of processes have turned away, by process; of those that
            the scheduler does not hear of.
        labels: of vLLM's metrics.
    """

    def __init__(
        self,
        unproven: Callable[[], Mapping[str, int]],
        labels: EngineLabels,
        registry: CollectorRegistry = REGISTRY,
        refresh_interval_s: float = REFRESH_INTERVAL_S,
    ) -> None:
        self._refresh_interval_s = refresh_interval_s
        self._unproven = unproven
        self._labels = labels
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
        yield from families(cluster, self._labels.by_instance, {**self._unproven(), **known})


def families(
    cluster: ClusterDescription | None,
    labels: Mapping[int, int],
    unproven: Mapping[str, int],
) -> Iterator[Metric]:
    """The scheduler's description of the pool, as metrics.

    Args:
        cluster: nothing, while the scheduler is silent.
        labels: the ``engine`` label of each instance that is up, by engine index.
        unproven: what each process has turned away.
    """
    family = metrics.UNPROVEN_CONNECTIONS.gauge_family()
    for process, num_unauthenticated in sorted(unproven.items()):
        family.add_metric((process,), num_unauthenticated)
    yield family
    family = metrics.SCHEDULER_UP.gauge_family()
    family.add_metric((), float(cluster is not None))
    yield family
    family = metrics.BUILD_INFO.gauge_family()
    policy = cluster.policy if cluster is not None else ""
    family.add_metric((__version__, _vllm_version(), platform.python_version(), policy), 1)
    yield family
    if cluster is None:
        return
    # A name of before, for one release: `llumsched_migrations_total` has the label `cause` now.
    not_moved = CounterMetricFamily(
        "llumsched_migrations_not_moved",
        "Deprecated: sum by (cause) (llumsched_migrations_total).",
        labels=("cause",),
    )
    for cause, count in sorted(cluster.migration_causes.items()):
        not_moved.add_metric((cause,), count)
    yield not_moved
    family = metrics.QUEUED_REQUESTS.gauge_family()
    for priority_class, num_queued in {"low": 0, "normal": 0, "high": 0, **cluster.queued}.items():
        family.add_metric((priority_class,), num_queued)
    yield family
    yield from _instances(cluster, labels)


@functools.cache
def _vllm_version() -> str:
    return str(getattr(sys.modules.get("vllm"), "__version__", ""))


def _instances(cluster: ClusterDescription, labels: Mapping[int, int]) -> Iterator[Metric]:
    found = {
        spec: spec.gauge_family()
        for spec in metrics.CATALOGUE
        if spec.where is metrics.Where.POOL and spec.labels[:1] == ("instance_id",)
    }
    states = Counter({"serving": 0, "draining": 0})
    for instance in cluster.instances:
        name, load = instance.instance_id, instance.load
        states[instance.state] += 1
        label = labels.get(engine_index(name))
        engine = "" if label is None else str(label)
        identity = (name, engine, instance.role, instance.state, cluster.policy)
        found[metrics.INSTANCE_INFO].add_metric(identity, 1)
        can_migrate = float(not instance.cannot_migrate)
        found[metrics.INSTANCE_CAN_MIGRATE].add_metric((name,), can_migrate)
        freeness = finite_freeness(instance)
        if freeness is not None:
            found[metrics.INSTANCE_FREENESS].add_metric((name,), freeness)
        if instance.report_age_s is not None:
            found[metrics.INSTANCE_REPORT_AGE].add_metric((name,), instance.report_age_s)
        if load is None:
            continue
        blocks, requests = found[metrics.INSTANCE_BLOCKS], found[metrics.INSTANCE_REQUESTS]
        blocks.add_metric((name, "free"), load.num_free_blocks)
        blocks.add_metric((name, "reserved"), load.num_reserved_blocks)
        blocks.add_metric((name, "used"), load.num_used_blocks - load.num_reserved_blocks)
        requests.add_metric((name, "running"), load.num_running)
        requests.add_metric((name, "waiting"), load.num_waiting)
        moving = found[metrics.INSTANCE_MIGRATIONS]
        moving.add_metric((name, "in"), load.num_migrations_in)
        moving.add_metric((name, "out"), load.num_migrations_out)
        found[metrics.INSTANCE_STEP].add_metric((name,), load.step_time_s)
    yield from found.values()
    family = metrics.INSTANCES.gauge_family()
    for state, count in sorted(states.items()):
        family.add_metric((state,), count)
    yield family
    family = metrics.FREENESS_SPREAD.gauge_family()
    family.add_metric((), freeness_spread(cluster.instances))
    yield family
    family = metrics.FRAGMENTED_BLOCKS.gauge_family()
    family.add_metric((), fragmented_blocks(cluster.instances))
    yield family


def finite_freeness(instance: InstanceDescription) -> float | None:
    """Freeness as a number: an idle instance has all its blocks, one that drains has none."""
    if instance.freeness is not None or instance.state == "draining" or instance.load is None:
        return instance.freeness
    return float(instance.load.num_free_blocks)


def freeness_spread(instances: Sequence[InstanceDescription]) -> float:
    """The greatest freeness of a serving instance less the least; 0 if there is but one."""
    told = [finite_freeness(i) for i in instances if i.state == "serving"]
    known = [freeness for freeness in told if freeness is not None]
    return max(known) - min(known) if known else 0.0


def fragmented_blocks(instances: Sequence[InstanceDescription]) -> int:
    """Free blocks that first requests in line need, where others have them (Llumnix, section 3)."""
    loads = [i.load for i in instances if i.load is not None and i.state == "serving"]
    found = 0
    for load in loads:
        missing = load.head_of_line_blocks - load.num_free_blocks
        if load.num_waiting and missing > 0:
            elsewhere = sum(other.num_free_blocks for other in loads if other is not load)
            found += min(missing, elsewhere)
    return found
