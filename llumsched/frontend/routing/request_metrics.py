"""Metrics that the pool adds: how requests fared, by priority class, and how many moved.

vLLM's own metrics stay as they are, with one ``engine`` label an instance. These are registered
beside them and are counted where the client's view is: in the frontend.
"""

from __future__ import annotations

import time

from prometheus_client import REGISTRY, CollectorRegistry
from vllm.v1.engine import EngineCoreRequest

from llumsched import metrics
from llumsched.core.types import PriorityClass
from llumsched.frontend.routing.routes import Route


class FrontendMetrics:
    """One set for a frontend. Priority classes are labelled ``low``, ``normal`` and ``high``."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.requests = metrics.REQUESTS.counter(registry)
        self.ttft_s = metrics.TIME_TO_FIRST_TOKEN.histogram(registry)
        self.placement_s = metrics.PLACEMENT.histogram(registry)
        self.pause_s = metrics.CLIENT_PAUSE.histogram(registry)
        self.moves = metrics.MOVES.counter(registry)
        self.lost_instances = metrics.LOST_INSTANCES.counter(registry)
        self.resumptions = metrics.RESUMPTIONS.counter(registry)

    def opened(self, route: Route, request: EngineCoreRequest) -> None:
        """A request has come; nothing has been sent yet."""

    def first_token(self, route: Route) -> None:
        self.ttft_s.labels(_label(route)).observe(time.monotonic() - route.opened_s)

    def placed(self, route: Route) -> None:
        waited_s = time.monotonic() - route.opened_s
        self.placement_s.labels(_label(route)).observe(waited_s)

    def tokens(self, route: Route) -> None:
        now_s = time.monotonic()
        if route.pause_cause:
            self.paused(route, now_s)
        route.last_token_s = now_s

    def paused(self, route: Route, now_s: float) -> None:
        """The first token since its last has come from another instance."""
        self.pause_s.labels(route.pause_cause).observe(now_s - route.last_token_s)

    def moved(self, route: Route) -> None:
        self.moves.inc()

    def finished(self, route: Route) -> None:
        self.ended(route, "finished")

    def ended(self, route: Route, outcome: str) -> None:
        self.requests.labels(_label(route), outcome).inc()


def _label(route: Route) -> str:
    return PriorityClass(route.priority_class).name.lower()
