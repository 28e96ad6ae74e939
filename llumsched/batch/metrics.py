"""Prometheus metrics of the batch process: its own counts, and the states of the database.

States are read when somebody asks, so they are those of all processes that share the database.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, generate_latest

from llumsched import metrics
from llumsched.batch import store
from llumsched.batch.database import Database, batches, claims, files, workers
from llumsched.batch.states import OPEN
from llumsched.batch.store import Again, Ended


class BatchMetrics:
    """See the module docstring.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        self.registry = registry = CollectorRegistry()
        self._readers: list[Callable[[sa.Connection], None]] = [self._read]
        self._files = metrics.BATCH_FILES.gauge(registry)
        self._batches = metrics.BATCHES.gauge(registry)
        self._open_lines = metrics.BATCH_OPEN_LINES.gauge(registry)
        self._late = metrics.BATCH_LATE.gauge(registry)
        self._workers = metrics.BATCH_WORKERS.gauge(registry)
        self._uploads = metrics.BATCH_UPLOADS.counter(registry)
        self._lines = metrics.BATCH_LINES.counter(registry)
        self._retries = metrics.BATCH_RETRIES.counter(registry)
        self._lost = metrics.BATCH_LOST_LINES.counter(registry)
        self._tries = metrics.BATCH_TRY_SECONDS.histogram(registry)

    def reads(self, reader: Callable[[sa.Connection], None]) -> None:
        """Have this called, in a thread, before the metrics are shown."""
        self._readers.append(reader)

    def uploaded(self, *, is_accepted: bool) -> None:
        """An upload is over."""
        self._uploads.labels("accepted" if is_accepted else "refused").inc()

    def tried(self, seconds: float, result: Ended | Again) -> None:
        """A line was sent, and this came of it after so long."""
        self._tries.observe(seconds)
        if isinstance(result, Again):
            self._retries.labels("failed" if result.is_failure else "given_back").inc()

    def ended(self, num_succeeded: int, num_failed: int) -> None:
        """So many lines have their outcome."""
        self._lines.labels("succeeded").inc(num_succeeded)
        self._lines.labels("failed").inc(num_failed)

    def lost(self, num_lines: int) -> None:
        """So many lines were taken from processes that are gone."""
        self._lost.inc(num_lines)

    def page(self) -> bytes:
        """All of it in Prometheus' text format. It reads the database, and blocks."""
        with self._database.reading() as connection:
            for read in self._readers:
                read(connection)
        self._late.set(store.is_any_late(self._database, self._clock()))
        return generate_latest(self.registry)

    def _read(self, connection: sa.Connection) -> None:
        for gauge, spec, column in (
            (self._files, metrics.BATCH_FILES, files.c.purpose),
            (self._batches, metrics.BATCHES, batches.c.status),
        ):
            query = sa.select(column, sa.func.count()).group_by(column)
            found = {row[0]: row[1] for row in connection.execute(query)}
            for name in {*found, *(known for (known,) in spec.known)}:
                gauge.labels(name).set(found.get(name, 0))
        not_begun = connection.scalar(
            sa.select(sa.func.sum(batches.c.total - batches.c.claimed_up_to)).where(
                batches.c.status.in_(OPEN)
            )
        )
        in_flight, waiting = (
            connection.scalar(sa.select(sa.func.count()).select_from(claims).where(condition))
            for condition in (claims.c.worker_id.is_not(None), claims.c.worker_id.is_(None))
        )
        self._open_lines.labels("not_begun").set(not_begun or 0)
        self._open_lines.labels("in_flight").set(in_flight or 0)
        self._open_lines.labels("to_be_tried_again").set(waiting or 0)
        live = sa.select(sa.func.count()).select_from(workers)
        live = live.where(workers.c.lease_until > self._clock())
        self._workers.set(connection.scalar(live) or 0)
