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

from llumsched.frontend.routing.engine_labels import EngineLabels

PATH = "/metrics"


class Registry(Protocol):
    """Source of metrics."""

    def collect(self) -> Iterable[Metric]: ...


class ShownMetrics:
    """A registry without the samples of labels that are not shown.

    Args:
        names: of the samples that are shown; by default all are.
    """

    def __init__(
        self, registry: Registry, labels: EngineLabels, names: frozenset[str] | None = None
    ) -> None:
        self._registry = registry
        self._labels = labels
        self._names = names

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            hidden = self._labels.hidden(gauges=metric.type == "gauge")
            shown = Metric(metric.name, metric.documentation, metric.type, metric.unit)
            shown.samples = [
                s
                for s in metric.samples
                if s.labels.get("engine") not in hidden
                and (self._names is None or s.name in self._names)
            ]
            if shown.samples or self._names is None:
                yield shown

    def restricted_registry(self, names: Iterable[str]) -> ShownMetrics:
        """The samples of these names only."""
        return ShownMetrics(self._registry, self._labels, frozenset(names))


def expose(app: FastAPI, labels: EngineLabels, registry: Registry) -> None:
    """Answer ``GET /metrics`` in place of vLLM's own route."""
    route = Mount(PATH, make_asgi_app(registry=ShownMetrics(registry, labels)))
    # As vLLM has it: without a redirect to PATH/.
    route.path_regex = re.compile(f"^{PATH}(?P<path>.*)$")
    app.router.routes.insert(0, route)
