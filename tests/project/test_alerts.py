"""Each alert fires on what it is about, alone, and none of them on a pool that is well."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.project.test_monitoring import ALERTS, rules

ZERO, ONE, ONE_A_MINUTE, ONE_A_SECOND = "0+0x60", "1+0x60", "0+1x60", "0+60x60"
FIRST_TOKEN = "llumsched_time_to_first_token_seconds_bucket"
PAUSE = "llumsched_client_pause_seconds_bucket"
MIGRATIONS = "llumsched_migrations_total"
WELL = {
    "llumsched_scheduler_up": ONE,
    "llumsched_scheduler_starts_total": ONE,
    'llumsched_instances{state="serving"}': ONE,
    "llumsched_lost_instances_total": ONE,
    'llumsched_queued_requests{priority_class="normal"}': ZERO,
    'llumsched_rejections_total{cause="full"}': ZERO,
    FIRST_TOKEN + '{priority_class="normal",le="10"}': ONE_A_SECOND,
    FIRST_TOKEN + '{priority_class="normal",le="30"}': ONE_A_SECOND,
    FIRST_TOKEN + '{priority_class="normal",le="+Inf"}': ONE_A_SECOND,
    'llumsched_policy_failures_total{policy="Mine"}': ZERO,
    MIGRATIONS + '{outcome="aborted"}': ONE_A_MINUTE,
    MIGRATIONS + '{outcome="committed"}': ONE_A_SECOND,
    PAUSE + '{cause="migration",le="2"}': ONE_A_SECOND,
    PAUSE + '{cause="migration",le="5"}': ONE_A_SECOND,
    PAUSE + '{cause="migration",le="+Inf"}': ONE_A_SECOND,
    'llumsched_instance_can_migrate{instance_id="instance-0"}': ONE,
    'llumsched_instance_report_age_seconds{instance_id="instance-0"}': ONE,
    'llumsched_unproven_connections{process="scheduler"}': ONE,
}
# What is other than well, for each alert; and after how many minutes it is looked at.
ILL: Mapping[str, tuple[dict[str, str], int]] = {
    "LlumschedSchedulerDown": ({"llumsched_scheduler_up": ZERO}, 40),
    "LlumschedSchedulerRestarts": ({"llumsched_scheduler_starts_total": ONE_A_MINUTE}, 40),
    # Before it is a queue that grows as well.
    "LlumschedNoInstanceServes": (
        {
            'llumsched_instances{state="serving"}': ZERO,
            'llumsched_queued_requests{priority_class="normal"}': ONE,
        },
        3,
    ),
    "LlumschedInstancesDie": ({"llumsched_lost_instances_total": ONE_A_MINUTE}, 40),
    "LlumschedQueueGrows": ({'llumsched_queued_requests{priority_class="normal"}': ONE}, 40),
    "LlumschedRejects": ({'llumsched_rejections_total{cause="full"}': ONE_A_SECOND}, 40),
    "LlumschedSlowFirstToken": ({FIRST_TOKEN + '{priority_class="normal",le="10"}': ZERO}, 40),
    "LlumschedPolicyFails": ({'llumsched_policy_failures_total{policy="Mine"}': ONE_A_MINUTE}, 40),
    "LlumschedMigrationsFail": (
        {
            MIGRATIONS + '{outcome="aborted"}': ONE_A_SECOND,
            MIGRATIONS + '{outcome="committed"}': ONE_A_MINUTE,
        },
        40,
    ),
    "LlumschedMigrationsPause": ({PAUSE + '{cause="migration",le="2"}': ZERO}, 40),
    "LlumschedInstanceCannotMigrate": (
        {'llumsched_instance_can_migrate{instance_id="instance-0"}': ZERO},
        40,
    ),
    "LlumschedStaleReports": (
        {'llumsched_instance_report_age_seconds{instance_id="instance-0"}': "9+0x60"},
        40,
    ),
    "LlumschedStrangers": (
        {'llumsched_unproven_connections{process="scheduler"}': ONE_A_SECOND},
        40,
    ),
    "LlumschedProxyServerAway": ({'llumsched_proxy_server_up{server="10.0.0.1:8000"}': ZERO}, 40),
    "LlumschedBatchLate": ({"llumsched_batch_late": ONE}, 40),
    "LlumschedJobFails": (
        {'llumsched_job_run_seconds_count{job_name="a",outcome="failed"}': ONE_A_MINUTE},
        40,
    ),
}


def case(series: Mapping[str, str], minutes: int, firing: str | None) -> dict[str, Any]:
    """A case for promtool: what to feed, and what is to fire."""
    expected = [{"labels": f'{{alertname="{firing}"}}', "value": 1}] if firing else []
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{minutes}m",
                "exp_samples": expected,
            }
        ],
    }


def test_every_alert_has_its_case() -> None:
    assert [rule["alert"] for rule in rules()] == list(ILL)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus is not installed")
def test_an_alert_fires_on_what_it_is_about_and_none_on_a_pool_that_is_well(tmp_path: Path) -> None:
    cases = [case(WELL, 40, None)]
    cases += [case(WELL | ill, minutes, name) for name, (ill, minutes) in ILL.items()]
    path = tmp_path / "cases.yaml"
    path.write_text(
        yaml.safe_dump({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": cases})
    )
    done = subprocess.run(
        ("promtool", "test", "rules", str(path)), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
