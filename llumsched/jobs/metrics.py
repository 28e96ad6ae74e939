"""Prometheus metrics of jobs, beside those of batches."""

from __future__ import annotations

import sqlalchemy as sa
from prometheus_client import CollectorRegistry

from llumsched import metrics
from llumsched.jobs.store import runs


class JobMetrics:
    """Counts what this process does, and shows the states of all runs.

    Args:
        registry: where they are shown.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._runs = metrics.JOB_RUNS.gauge(registry)
        self._seconds = metrics.JOB_RUN_SECONDS.histogram(registry)
        self._misfires = metrics.JOB_MISFIRES.counter(registry)
        self._lost = metrics.JOB_LOST_RUNS.counter(registry)

    def ended(self, job_name: str, outcome: str, seconds: float) -> None:
        """A try of a run is over."""
        self._seconds.labels(job_name, outcome).observe(seconds)

    def missed(self, job_name: str, number: int) -> None:
        """So many times of a job passed while nobody looked."""
        self._misfires.labels(job_name).inc(number)

    def lost(self, num_runs: int) -> None:
        """So many runs were taken from processes that are gone."""
        self._lost.inc(num_runs)

    def read(self, connection: sa.Connection) -> None:
        """Look how many runs are in which state."""
        query = sa.select(runs.c.job, runs.c.state, sa.func.count()).group_by(
            runs.c.job, runs.c.state
        )
        self._runs.clear()
        for name, state, number in connection.execute(query):
            self._runs.labels(name, state).set(number)
