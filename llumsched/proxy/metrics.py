"""Prometheus metrics of the proxy; those of the servers stay with the servers."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llumsched.proxy.fleet import Fleet

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class ProxyMetrics:
    """Counts requests, failures and the time to the first byte, and shows the servers' load."""

    def __init__(self, fleet: Fleet) -> None:
        self._registry = CollectorRegistry()
        self._first_byte = Histogram(
            "llumsched_proxy_time_to_first_byte_seconds",
            "From a request's arrival to the first byte of its answer.",
            ["server"],
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._failed = Counter(
            "llumsched_proxy_failures",
            "Requests that a server failed, before or after the first byte of the answer.",
            ["server", "when"],
            registry=self._registry,
        )
        self._turned_away = Counter(
            "llumsched_proxy_rejections",
            "Requests that the scheduler turned away.",
            registry=self._registry,
        )
        self._continued = Counter(
            "llumsched_proxy_continuations",
            "Streams of another server, lost in the middle, that this one brought to their end.",
            ["server"],
            registry=self._registry,
        )
        self._registry.register(_ServerCollector(fleet))

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


class _ServerCollector(Collector):
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily(
            "llumsched_proxy_server_up", "1 while requests are sent to it.", labels=["server"]
        )
        sent = GaugeMetricFamily(
            "llumsched_proxy_server_requests",
            "Requests sent to a server that have no whole answer yet.",
            labels=["server"],
        )
        for server in self._fleet.servers.values():
            up.add_metric([server.server_id], float(server.is_there))
            sent.add_metric([server.server_id], len(server.sent))
        yield up
        yield sent
