"""Snapshots and drivers for policy tests: a cluster is written as one load per instance."""

from __future__ import annotations

from typing import Any

from llumsched.config import Config, build_bundle
from llumsched.core.actions import StartMigration
from llumsched.core.events import Ticked
from llumsched.core.policy import MigrationPair, MigrationPolicy, PolicyBundle
from llumsched.core.snapshot import ClusterSnapshot
from tests.core.builders import Driver


def bundle_named(name: str, **params: Any) -> PolicyBundle:
    return build_bundle(Config(policy=name, params=params))


def make_driver(
    bundle: PolicyBundle | str, loads: dict[str, dict[str, Any]], **options: Any
) -> Driver:
    """Instances with these loads; `role` and `max_num_seqs` go into the spec."""
    driver = Driver(bundle_named(bundle) if isinstance(bundle, str) else bundle, **options)
    for instance_id, load in loads.items():
        spec = {key: load[key] for key in ("role", "max_num_seqs", "block_size") if key in load}
        driver.join(instance_id, **spec)
        report(driver, instance_id, load)
    return driver


def report(driver: Driver, instance_id: str, load: dict[str, Any]) -> tuple[Any, ...]:
    spec_keys = ("role", "max_num_seqs", "block_size")
    return driver.report(instance_id, **{k: v for k, v in load.items() if k not in spec_keys})


def place(driver: Driver, request_id: str = "r", **request: Any) -> str | None:
    """Where a request goes; None if it is held or rejected."""
    driver.arrive(request_id, **request)
    return driver.scheduler.request_instance(request_id)


def pairs(policy: MigrationPolicy, cluster: ClusterSnapshot) -> list[tuple[str, str]]:
    proposed: list[MigrationPair] = list(policy.rebalance(cluster))
    return [(p.source, p.destination) for p in proposed]


def tick(driver: Driver, by_s: float = 1.0) -> list[tuple[str, str]]:
    """The migrations that start by then."""
    driver.now += by_s
    actions = driver.handle(Ticked())
    return [(a.source, a.destination) for a in actions if isinstance(a, StartMigration)]
