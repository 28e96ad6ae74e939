"""A real Prometheus scrapes what a pool exposes, evaluates every rule and answers every query."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml
from prometheus_client import CollectorRegistry, start_http_server

from llumsched.frontend.http.pool_metrics import families
from llumsched.frontend.routing.request_metrics import FrontendMetrics
from llumsched.scheduler.metrics import SchedulerMetrics
from scripts.server_process import free_port, wait_until
from tests.frontend.test_pool_metrics import description
from tests.project.test_monitoring import ALERTS, SCRAPE, queries, rules

TIMEOUT_S = 60.0


class Pool:
    """Collects what the scheduler tells of a pool."""

    def collect(self) -> Iterator[Any]:
        """The pool's families."""
        yield from families(description(), {3: 1}, {"scheduler": 0})


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus with the project's configuration, which has scraped."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("Prometheus is not installed")
    registry = CollectorRegistry()
    FrontendMetrics(registry)
    SchedulerMetrics("latency", (), registry)
    registry.register(Pool())
    target, _ = start_http_server(0, "127.0.0.1", registry)
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load(SCRAPE.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(ALERTS)]
    (job,) = (job for job in config["scrape_configs"] if job["job_name"] == "llumsched")
    job["static_configs"] = [{"targets": [f"127.0.0.1:{target.server_port}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            (
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        assert wait_until(lambda: has_scraped(url), TIMEOUT_S), (folder / "log").read_text()
        yield url
    finally:
        process.terminate()
        process.wait(timeout=TIMEOUT_S)
        target.shutdown()


def asked(url: str, path: str, **parameters: str) -> dict[str, Any]:
    with urlopen(f"{url}/api/v1/{path}?{urlencode(parameters)}", timeout=10) as answer:
        found: dict[str, Any] = json.load(answer)
    assert found["status"] == "success", found
    return found["data"]  # type: ignore[no-any-return]


def has_scraped(url: str) -> bool:
    try:
        (up,) = asked(url, "query", query='up{job="llumsched"}')["result"]
    except (OSError, ValueError):
        return False
    return bool(up["value"][1] == "1")


def test_it_evaluates_every_rule(prometheus: str) -> None:
    def evaluated() -> list[dict[str, Any]]:
        groups = asked(prometheus, "rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    assert wait_until(lambda: {r["health"] for r in evaluated()} == {"ok"}, TIMEOUT_S), evaluated()
    assert len(evaluated()) == len(rules())


def test_it_answers_every_query_of_the_boards(prometheus: str) -> None:
    for where, query in queries():
        found = asked(prometheus, "query", query=query.replace("$instance_id", ".*"))
        assert found["resultType"] in ("vector", "scalar"), where


def test_it_has_the_instances(prometheus: str) -> None:
    (found,) = asked(prometheus, "query", query="llumsched_instance_freeness")["result"]
    assert found["metric"]["instance_id"] == "instance-3"
