"""A scrape sees the engines that there are."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter, Gauge
from starlette.testclient import TestClient

from llumsched.frontend.http.exposition import expose
from llumsched.frontend.routing.engine_labels import EngineLabels


@pytest.fixture
def registry() -> CollectorRegistry:
    """As vLLM's is: the series of all labels are made at once."""
    registry = CollectorRegistry()
    running = Gauge("vllm:running", "now", ("model", "engine"), registry=registry)
    finished = Counter("vllm:finished", "ever", ("model", "engine"), registry=registry)
    for label in range(4):
        running.labels("m", str(label)).set(label)
        finished.labels("m", str(label)).inc(label)
    Gauge("python", "without engines", registry=registry).set(7)
    return registry


@pytest.fixture
def labels(registry: CollectorRegistry) -> EngineLabels:
    """Of four labels 0 is in use, 1 was."""
    labels = EngineLabels(4)
    labels.take(10)
    labels.take(11)
    labels.give_back(11)
    return labels


def scrape(registry: CollectorRegistry, labels: EngineLabels, path: str) -> str:
    app = FastAPI()

    @app.get("/metrics")
    def theirs() -> str:
        return "vLLM's own page"

    expose(app, labels, registry)
    response = TestClient(app).get(path, follow_redirects=False)
    assert response.status_code == 200
    return response.text


def samples(page: str) -> set[str]:
    lines = page.splitlines()
    return {line for line in lines if not line.startswith("#") and "_created" not in line}


def test_gauges_are_those_of_instances_that_are_up(
    registry: CollectorRegistry, labels: EngineLabels
) -> None:
    assert samples(scrape(registry, labels, "/metrics")) == {
        'vllm:running{engine="0",model="m"} 0.0',
        'vllm:finished_total{engine="0",model="m"} 0.0',
        'vllm:finished_total{engine="1",model="m"} 1.0',
        "python 7.0",
    }


def test_so_are_those_that_are_asked_for_by_name(
    registry: CollectorRegistry, labels: EngineLabels
) -> None:
    assert samples(scrape(registry, labels, "/metrics?name[]=vllm:running")) == {
        'vllm:running{engine="0",model="m"} 0.0'
    }


def test_a_metric_is_described_though_nothing_of_it_is_shown(registry: CollectorRegistry) -> None:
    assert "# TYPE vllm:running gauge" in scrape(registry, EngineLabels(4), "/metrics")
