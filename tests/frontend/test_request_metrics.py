"""What a frontend counts: every metric is there from the start, and moves."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from llumsched.frontend.routing.request_metrics import FrontendMetrics
from llumsched.frontend.routing.routes import Route
from llumsched.metrics import CATALOGUE, Where


def samples(registry: CollectorRegistry) -> dict[str, float]:
    found: dict[str, float] = {}
    for family in registry.collect():
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_every_metric_of_the_catalogue_is_there_and_moves() -> None:
    registry = CollectorRegistry()
    metrics = FrontendMetrics(registry)
    before = samples(registry)
    route = Route("r", priority_class=1)
    metrics.first_token(route)
    metrics.moved(route)
    metrics.finished(route)
    metrics.placement_s.observe(0.001)
    metrics.lost_instances.inc()
    metrics.resumptions.inc()
    after = samples(registry)
    for spec in CATALOGUE:
        if spec.where is Where.FRONTEND:
            name = f"{spec.name}_count" if spec.kind == "histogram" else spec.exposed_name
            assert before[name] == 0, name
            assert after[name] == 1, name
