"""Jobs as a part of the batch process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping

from aiohttp import web

from llumsched.batch.database import Database
from llumsched.batch.endpoint import Endpoint
from llumsched.batch.worker import Worker
from llumsched.jobs import app as jobs_app
from llumsched.jobs import store
from llumsched.jobs.kinds import Doer
from llumsched.jobs.metrics import JobMetrics
from llumsched.jobs.runner import Runner
from llumsched.jobs.spec import Job

logger = logging.getLogger(__name__)


class Jobs:
    """Paths of jobs, and the runner, under the worker's lease.

    Args:
        jobs: those of the YAML file; None leaves what the database has.
        may_change: jobs can be added by the API.
    """

    def __init__(
        self,
        database: Database,
        endpoint: Endpoint,
        worker: Worker,
        *,
        jobs: Mapping[str, Job] | None,
        may_change: bool,
    ) -> None:
        self._database = database
        self._jobs = jobs
        self._may_change = may_change
        doer = Doer(database, endpoint, worker.wake, time.time)
        metrics = JobMetrics(worker.metrics.registry)
        worker.metrics.reads(metrics.read)
        self._runner = Runner(database, doer, worker.worker_id, metrics)

    def add_routes(self, app: web.Application) -> None:
        """Add the paths of jobs."""
        jobs_app.add_routes(app, self._database, may_change=self._may_change)

    async def run(self) -> None:
        """Take the file's jobs over, then do what is due until cancelled."""
        if self._jobs is not None:
            await asyncio.to_thread(store.put_file, self._database, self._jobs, time.time())
            logger.info("jobs: %s", ", ".join(sorted(self._jobs)) or "none")
        await self._runner.run()
