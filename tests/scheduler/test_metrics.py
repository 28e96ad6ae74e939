"""Metrics of the scheduler's process: every one moves, and none is lost with the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from llumsched.core.actions import (
    DispatchRequest,
    LaunchInstance,
    PolicyFailed,
    RejectRequest,
    StartMigration,
    TerminateInstance,
)
from llumsched.core.events import LaunchFailed, RequestFinished, Ticked
from llumsched.metrics import CATALOGUE, Where
from llumsched.scheduler.metrics import OTHER, Reasons, SchedulerMetrics
from llumsched.scheduler.migration_worth import MigrationWorth
from tests.builders import STATISTICS, migration_report, samples

COMMITTED = migration_report(phase="committing", statistics=STATISTICS)
WORTH = MigrationWorth(migration_id="m-1", request_id="r-1", source="a", won_s=1.5, expected_s=2.0)
PROGRAM = """
import os, signal, sys
from pathlib import Path
from llumsched.scheduler import metrics
metrics.keep_in(Path(sys.argv[1]))
counts = metrics.SchedulerMetrics("latency", ["Mine"])
from tests.scheduler.test_metrics import COMMITTED
counts.migration_ended(COMMITTED)
print(counts.outcomes, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def moved(name: str) -> set[str]:
    """Samples of which one has to grow for a metric to have moved."""
    return {f"{name}_total", f"{name}_count", name}


def test_every_metric_of_the_catalogue_moves() -> None:
    registry = CollectorRegistry()
    counts = SchedulerMetrics("latency", ["Mine"], registry)
    before = samples(registry)
    actions = (
        DispatchRequest(request_id="r", instance_id="a", reason="freeness=12.5"),
        RejectRequest(request_id="r", reason="full"),
        StartMigration(migration_id="m", source="a", destination="b", request_id=None, reason=""),
        LaunchInstance(launch_id="l", reason=""),
        TerminateInstance(instance_id="a", reason=""),
        PolicyFailed(policy="Mine", error="KeyError: 'typo'"),
    )
    counts.handled(Ticked(), actions, 0.001)
    counts.handled(LaunchFailed(launch_id="l", reason=""), (), 0.001)
    counts.handled(RequestFinished(request_id="r", num_output_tokens=7), (), 0.001)
    counts.migration_ended(COMMITTED)
    counts.migration_ended(msgspec.structs.replace(COMMITTED, has_ended=True))
    counts.migration_won(WORTH)
    counts.drained()
    after = samples(registry)
    for spec in CATALOGUE:
        if spec.where is Where.SCHEDULER and spec.name != "llumsched_scheduler_starts":
            grown = {n for n in moved(spec.name) if after.get(n, 0) > before.get(n, 0)}
            assert grown, f"{spec.name} did not move"
    assert after["llumsched_scheduler_starts_total"] == 1
    assert counts.outcomes == {"committed": 1}
    assert counts.policy_failures == {"Mine": 1}
    assert counts.num_output_tokens == 7


def test_counters_are_there_before_anything_has_happened() -> None:
    registry = CollectorRegistry()
    SchedulerMetrics("latency", ["Mine"], registry)
    there = {
        (sample.name, *sample.labels.values())
        for family in registry.collect()
        for sample in family.samples
    }
    assert ("llumsched_migrations_total", "committed", "committing", "") in there
    assert ("llumsched_policy_failures_total", "Mine") in there
    assert ("llumsched_scaling_actions_total", "launch") in there
    assert ("llumsched_migration_suspended_seconds_count",) in there


@pytest.mark.parametrize(
    ("reason", "label"),
    [
        ("freeness=12.5", "freeness=N"),
        ("freeness=-inf", "freeness=N"),
        ("3 of 12 blocks cached", "N of N blocks cached"),
        ("consolidate: KV usage 40% -> 75%", "consolidate: KV usage N -> N"),
        ("beside instance-3", "beside instance-N"),
        ("information", "information"),
    ],
)
def test_a_reason_is_a_label_without_its_numbers(reason: str, label: str) -> None:
    assert Reasons().label(reason) == label


def test_a_policy_that_makes_up_reasons_does_not_make_series_without_end() -> None:
    reasons = Reasons(most=2)
    said = [reasons.label(word) for word in ("a", "b", "c", "d", "a")]
    assert said == ["a", "b", OTHER, OTHER, "a"]


def test_counts_go_on_when_the_scheduler_is_killed_and_started_again(tmp_path: Path) -> None:
    said = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[2],
        )
        for _ in range(2)
    ]
    assert [run.stdout for run in said] == ["{'committed': 1}\n", "{'committed': 2}\n"], said
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))  # type: ignore[no-untyped-call]
    found = samples(registry)
    assert found["llumsched_scheduler_starts_total"] == 2
    assert found["llumsched_migration_suspended_seconds_count"] == 2
    assert found["llumsched_migration_bytes_sum"] == 3_000_000
