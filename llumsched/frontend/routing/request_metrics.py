"""Metrics that the pool adds: how requests fared, by priority class, and how many moved.

vLLM's own metrics stay as they are, with one ``engine`` label an instance. These are registered
beside them and are counted where the client's view is: in the frontend.
"""

from __future__ import annotations

import time

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

from llumsched.core.types import PriorityClass
from llumsched.frontend.routing.routes import Route

# Seconds; from a token of a small model to the wait of a long prompt behind others.
LATENCY_BUCKETS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)
PLACEMENT_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 1.0, 10.0, 60.0)


class FrontendMetrics:
    """One set for a frontend. Priority classes are labelled ``normal`` and ``high``."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.requests = Counter(
            "llumsched_requests",
            "Requests that ended, by priority class and outcome.",
            ("priority_class", "outcome"),
            registry=registry,
        )
        self.ttft_s = Histogram(
            "llumsched_time_to_first_token_seconds",
            "From a request's arrival at the frontend to its first token.",
            ("priority_class",),
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.placement_s = Histogram(
            "llumsched_placement_seconds",
            "How long the global scheduler took to choose an instance, waiting included.",
            buckets=PLACEMENT_BUCKETS,
            registry=registry,
        )
        self.moves = Counter(
            "llumsched_moves",
            "Times that a request's outputs began to come from another instance.",
            registry=registry,
        )
        self.lost_instances = Counter(
            "llumsched_lost_instances",
            "Instances that ended while the server ran.",
            registry=registry,
        )

        self.resumptions = Counter(
            "llumsched_resumptions",
            "Times that a request was resumed at another instance because its own was gone.",
            registry=registry,
        )

    def first_token(self, route: Route) -> None:
        self.ttft_s.labels(_label(route)).observe(time.monotonic() - route.opened_s)

    def moved(self, route: Route) -> None:
        self.moves.inc()

    def finished(self, route: Route) -> None:
        self.ended(route, "finished")

    def ended(self, route: Route, outcome: str) -> None:
        self.requests.labels(_label(route), outcome).inc()


def _label(route: Route) -> str:
    return PriorityClass(route.priority_class).name.lower()
