"""Metrics of a frontend: every metric is there from the start, and moves."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from llumsched.frontend.routing.request_metrics import FrontendMetrics
from llumsched.frontend.routing.routes import Arrival, Route, Routes
from llumsched.metrics import CATALOGUE, Where
from tests.builders import samples


def test_every_metric_of_the_catalogue_is_there_and_moves() -> None:
    registry = CollectorRegistry()
    metrics = FrontendMetrics(registry)
    before = samples(registry)
    route = Route("r", priority_class=1)
    metrics.first_token(route)
    metrics.moved(route)
    metrics.finished(route)
    metrics.placed(route)
    metrics.tokens(route)
    route.pause_cause = "migration"
    metrics.tokens(route)
    metrics.lost_instances.inc()
    metrics.resumptions.inc()
    after = samples(registry)
    for spec in CATALOGUE:
        if spec.where is Where.FRONTEND:
            name = f"{spec.name}_count" if spec.kind == "histogram" else spec.exposed_name
            assert before[name] == 0, name
            assert after[name] == 1, name


def test_every_priority_class_is_there_from_the_start() -> None:
    registry = CollectorRegistry()
    FrontendMetrics(registry)
    for kind in ("low", "normal", "high"):
        labels = {"priority_class": kind}
        for name in ("llumsched_time_to_first_token_seconds", "llumsched_placement_seconds"):
            assert registry.get_sample_value(f"{name}_count", labels) == 0
        ended = {**labels, "outcome": "finished"}
        assert registry.get_sample_value("llumsched_requests_total", ended) == 0


class Output:
    """One token of a request."""

    finish_reason = None

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.new_token_ids = [7]


def pauses(registry: CollectorRegistry) -> dict[str, float | None]:
    name = "llumsched_client_pause_seconds_count"
    return {
        cause: registry.get_sample_value(name, {"cause": cause})
        for cause in ("migration", "resumption")
    }


def test_the_pause_of_a_client_is_counted_where_its_tokens_come_from_another_instance() -> None:
    registry = CollectorRegistry()
    routes = Routes(observer=FrontendMetrics(registry))
    route = routes.open("r")
    route.instance = 0
    routes.pass_on(0, [Output("r")])
    routes.pass_on(0, [Output("r")])
    assert pauses(registry) == {"migration": 0, "resumption": 0}
    routes.arrive("r", Arrival(instance=1, placement_number=1, num_tokens=2))
    routes.pass_on(1, [Output("r")])
    routes.pass_on(1, [Output("r")])
    assert pauses(registry) == {"migration": 1, "resumption": 0}
    assert routes.lose(1) == ["r"]
    routes.settle(route, 2, is_announced=False)
    routes.pass_on(2, [Output("r")])
    assert pauses(registry) == {"migration": 1, "resumption": 1}
