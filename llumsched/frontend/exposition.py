"""The page that Prometheus scrapes: vLLM's, without the engines that are not there.

vLLM makes the series of every engine label when it starts, at zero, though there are more labels
than instances (``labels``). Nothing else is left out, and nothing is counted here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Protocol

from fastapi import FastAPI
from prometheus_client import Metric, make_asgi_app
from starlette.routing import Mount
from vllm.v1.metrics.prometheus import get_prometheus_registry

from llumsched.frontend.labels import EngineLabels

PATH = "/metrics"


class Collector(Protocol):
    """Whoever has metrics."""

    def collect(self) -> Iterable[Metric]: ...


class Registry(Collector, Protocol):
    """What ``prometheus_client`` makes a page of."""

    def restricted_registry(self, names: Iterable[str]) -> Collector:
        """The samples of these names only."""


class ShownMetrics:
    """Metrics without the samples of labels that are not shown."""

    def __init__(self, metrics: Collector, labels: EngineLabels) -> None:
        self._metrics = metrics
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        for metric in self._metrics.collect():
            hidden = self._labels.hidden(gauges=metric.type == "gauge")
            shown = Metric(metric.name, metric.documentation, metric.type, metric.unit)
            shown.samples = [s for s in metric.samples if s.labels.get("engine") not in hidden]
            yield shown


class ShownRegistry(ShownMetrics):
    """A registry of such metrics."""

    def __init__(self, registry: Registry, labels: EngineLabels) -> None:
        super().__init__(registry, labels)
        self._registry = registry

    def restricted_registry(self, names: Iterable[str]) -> ShownMetrics:
        """The samples of these names only."""
        return ShownMetrics(self._registry.restricted_registry(names), self._labels)


def expose(app: FastAPI, labels: EngineLabels) -> None:
    """Answer ``GET /metrics`` in place of vLLM's own route."""
    registry = ShownRegistry(get_prometheus_registry(), labels)
    route = Mount(PATH, make_asgi_app(registry=registry))
    # As vLLM has it: without a redirect to PATH/.
    route.path_regex = re.compile(f"^{PATH}(?P<path>.*)$")
    app.router.routes.insert(0, route)
