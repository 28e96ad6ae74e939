"""Prometheus metrics of the proxy; those of the servers stay with the servers."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from llumsched import metrics
from llumsched.proxy.fleet import Fleet


class ProxyMetrics:
    """Counts requests, failures and the time to the first byte, and shows the servers' load."""

    def __init__(self, fleet: Fleet) -> None:
        self._registry = CollectorRegistry()
        self._first_byte = metrics.PROXY_FIRST_BYTE.histogram(self._registry)
        self._failed = metrics.PROXY_FAILURES.counter(self._registry)
        self._turned_away = metrics.PROXY_REJECTIONS.counter(self._registry)
        self._continued = metrics.PROXY_CONTINUATIONS.counter(self._registry)
        self._registry.register(_FleetCollector(fleet))

    def first_byte(self, server_id: str, seconds: float) -> None:
        """An answer has begun."""
        self._first_byte.labels(server_id).observe(seconds)

    def failed(self, server_id: str, when: str) -> None:
        """A server failed a request."""
        self._failed.labels(server_id, when).inc()

    def turned_away(self) -> None:
        """The scheduler rejected a request."""
        self._turned_away.inc()

    def continued(self, server_id: str) -> None:
        """A server gave the rest of another's answer."""
        self._continued.labels(server_id).inc()

    def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)


class _FleetCollector(Collector):
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        up = metrics.PROXY_SERVER_UP.gauge_family()
        sent = metrics.PROXY_SERVER_REQUESTS.gauge_family()
        for server in self._fleet.servers.values():
            up.add_metric([server.server_id], float(server.is_there))
            sent.add_metric([server.server_id], len(server.sent))
        yield up
        yield sent
        failures = metrics.POLICY_FAILURES.counter_family()
        for policy, number in sorted(self._fleet.policy_failures.items()):
            failures.add_metric([policy], number)
        yield failures
