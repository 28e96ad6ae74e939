"""The part of the batch process that begins and does the runs of jobs.

Invariant: a run that was taken ends here, or its process's lease does and another begins it again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable

import sqlalchemy as sa

from llumsched.batch.database import Database
from llumsched.jobs import store
from llumsched.jobs.kinds import Doer, RunFailed
from llumsched.jobs.metrics import JobMetrics
from llumsched.jobs.store import Run
from llumsched.logs import FailureLog

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 0.25
FORGET_INTERVAL_S = 3600.0


class Runner:
    """See the module docstring.

    Args:
        database: has the jobs.
        doer: does a run.
        worker_id: under whose lease runs are done.
        metrics: what is counted.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        database: Database,
        doer: Doer,
        worker_id: str,
        metrics: JobMetrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database, self._doer = database, doer
        self._worker_id = worker_id
        self._metrics = metrics
        self._clock = clock
        self._doing: set[asyncio.Task[None]] = set()
        self._failures = FailureLog(logger)
        self._forgot_at = float("-inf")

    async def run(self) -> None:
        """Begin and do runs until cancelled; those that are not over are begun again elsewhere."""
        try:
            while True:
                try:
                    await self.look()
                except sa.exc.SQLAlchemyError as error:
                    self._failures.warned("database", "the database does not answer: %s", error)
                await asyncio.sleep(LOOK_INTERVAL_S)
        finally:
            for task in self._doing:
                task.cancel()
            await asyncio.gather(*self._doing, return_exceptions=True)

    async def look(self) -> None:
        """Begin what is due, once."""
        now = self._clock()
        self._metrics.lost(await asyncio.to_thread(store.free_lost, self._database, now))
        missed: Counter[str] = Counter()
        await asyncio.to_thread(store.begin_due, self._database, now, missed)
        for name, number in missed.items():
            self._metrics.missed(name, number)
        for run in await asyncio.to_thread(store.take, self._database, self._worker_id, now):
            task = asyncio.create_task(self._do(run))
            self._doing.add(task)
            task.add_done_callback(self._doing.discard)
        if now - self._forgot_at > FORGET_INTERVAL_S:
            await asyncio.to_thread(store.forget_old, self._database, now)
            self._forgot_at = now

    async def until_done(self) -> None:
        """Wait until no run is being done."""
        await asyncio.gather(*self._doing)

    async def _do(self, run: Run) -> None:
        async def say(message: str) -> None:
            await asyncio.to_thread(store.say, self._database, run.run_id, self._clock(), message)

        is_success = False
        begun_s = time.monotonic()
        try:
            async with asyncio.timeout(run.job.timeout_s):
                message = await self._doer.do(run, say)
            is_success = True
        except RunFailed as error:
            message = str(error)
        except TimeoutError:
            message = f"not over after {run.job.timeout_s:g} s"
        except Exception as error:
            logger.exception("%s of %s failed by a fault of this program", run.run_id, run.job.name)
            message = f"{type(error).__name__}: {error}"
        logger.info("%s of %s: %s", run.run_id, run.job.name, message)
        is_written = await asyncio.to_thread(
            store.end,
            self._database,
            self._worker_id,
            run,
            self._clock(),
            is_success=is_success,
            message=message,
        )
        if is_written:
            state = run.outcome(is_success=is_success)
            outcome = "to_be_tried_again" if state == store.WAITING else state
            self._metrics.ended(run.job.name, outcome, time.monotonic() - begun_s)
