"""One worker: takes lines under its lease, sends them, writes what became of them.

Invariant: every claimed line is given back as `Ended` or `Again`, or its lease runs out. Any number
of workers share a database; each sees the endpoint's room by itself, so their limits add up to what
is free. A worker that is killed loses nothing: its lines are another's once its lease is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import sqlalchemy as sa

from llumsched.batch import claiming, files, store
from llumsched.batch.database import Database
from llumsched.batch.endpoint import Answer, Away, Endpoint, Unanswered
from llumsched.batch.lines import answered, unanswered
from llumsched.batch.metrics import BatchMetrics
from llumsched.batch.pacing import Pace
from llumsched.batch.store import Again, Claimed, Ended
from llumsched.logs import FailureLog

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 0.25
ASK_AGAIN_S = 30.0
"""An endpoint that does not tell how much room it has is asked again after so long."""
MOST_AT_ONCE = 256
RATE_MEMORY_S = 60.0
TIDY_INTERVAL_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """How a worker behaves. Times are seconds."""

    most_in_flight: int = 256
    beside_others: int = 1
    most_failures: int = 8
    """A line that has failed so often has failed."""
    first_backoff_s: float = 1.0
    most_backoff_s: float = 60.0
    lease_s: float = 15.0


class Worker:
    """See the module docstring. `clock` gives seconds since the epoch."""

    def __init__(
        self,
        database: Database,
        endpoint: Endpoint,
        options: WorkerOptions | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.worker_id = f"worker-{uuid.uuid4().hex[:12]}"
        self.metrics = BatchMetrics(database, clock)
        self.pace = Pace()
        self._database, self._endpoint = database, endpoint
        self._options = options or WorkerOptions()
        self.pace.most_in_flight = self._options.most_in_flight
        self.pace.beside_others = self._options.beside_others
        self._clock = clock
        self._in_flight: dict[asyncio.Task[Ended | Again], Claimed] = {}
        self._results: asyncio.Queue[tuple[str, Ended | Again]] = asyncio.Queue()
        self._wakes = asyncio.Event()
        self._writing = asyncio.Lock()
        self._is_late = False
        self._tells_room = True
        self._ask_room_at = self._away_until = 0.0
        self._away_backoff_s = 0.0
        self._num_ended = 0
        self._lines_per_s = 0.0
        self._failures = FailureLog(logger)

    def wake(self) -> None:
        """Look for work now."""
        self._wakes.set()

    async def run(self) -> None:
        """Work until cancelled; then give back what is in flight."""
        await self._renew()
        keeping = [asyncio.create_task(self._beat()), asyncio.create_task(self._write())]
        try:
            while True:
                self._wakes.clear()
                try:
                    await self._look()
                except sa.exc.SQLAlchemyError as error:
                    self._failures.warned("database", "the database does not answer: %s", error)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_INTERVAL_S):
                        await self._wakes.wait()
        finally:
            await self._end(keeping)

    async def _end(self, keeping: list[asyncio.Task[None]]) -> None:
        for task in [*self._in_flight, *keeping]:
            task.cancel()
        await asyncio.gather(*self._in_flight, *keeping, return_exceptions=True)
        await self._settle()
        await asyncio.to_thread(claiming.leave, self._database, self.worker_id, self._clock())

    # ---- taking lines ------------------------------------------------------------------------

    async def _look(self) -> None:
        now = self._clock()
        if now < self._away_until:
            return
        if now >= self._ask_room_at:
            try:
                room = await self._endpoint.room()
            except Away as error:
                self._go_away(str(error))
                return
            self._away_backoff_s = 0.0
            self._tells_room = room is not None
            # Ends of lines wake this far more often than the room changes.
            self._ask_room_at = now + (ASK_AGAIN_S if room is None else 0.8 * LOOK_INTERVAL_S)
            if room is not None:
                self.pace.observe(room, len(self._in_flight), is_late=self._is_late)
        free = min(self.pace.limit - len(self._in_flight), MOST_AT_ONCE)
        if free > 0:
            claimed = await asyncio.to_thread(
                claiming.claim, self._database, self.worker_id, free, now
            )
            for line in claimed:
                task = asyncio.create_task(self._result(line))
                self._in_flight[task] = line
                task.add_done_callback(partial(self._done, time.monotonic()))

    def _done(self, begun_s: float, task: asyncio.Task[Ended | Again]) -> None:
        line = self._in_flight.pop(task)
        if task.cancelled():
            # The worker ends, or the batch does.
            result: Ended | Again = self._again(line, self._clock(), is_failure=False)
        elif (error := task.exception()) is not None:
            logger.error("%s-%d was not sent", line.batch_id, line.position, exc_info=error)
            message = f"{type(error).__name__}: {error}"
            result = self._failed(line, None, unanswered(line.custom_id, "not_sent", message))
        else:
            result = task.result()
        self.metrics.tried(time.monotonic() - begun_s, result)
        self._results.put_nowait((line.batch_id, result))

    def _go_away(self, reason: str) -> None:
        if self._clock() < self._away_until:
            # All that was in flight fails at once, and counts once.
            return
        self._failures.warned("away", "the endpoint is away, lines wait: %s", reason)
        most = self._options.most_backoff_s
        self._away_backoff_s = min(
            most, max(self._options.first_backoff_s, 2 * self._away_backoff_s)
        )
        self._away_until = self._ask_room_at = self._clock() + self._away_backoff_s

    # ---- sending one -------------------------------------------------------------------------

    async def _result(self, line: Claimed) -> Ended | Again:
        content = json.loads(line.text)
        name = f"{line.batch_id}-{line.position}"
        client = f"batch-{line.owner}" if line.owner else "batch"
        try:
            answer = await self._endpoint.send(content["url"], content["body"], name, client)
        except Away as error:
            self._go_away(str(error))
            return self._again(line, self._away_until, is_failure=False)
        except Unanswered as error:
            return self._failed(line, None, unanswered(line.custom_id, "unanswered", str(error)))
        if not self._tells_room:
            self.pace.answered(is_overloaded=answer.status in (429, 503))
        text = answered(line.custom_id, answer.status, answer.request_id, answer.content)
        if answer.is_worth_another_try:
            return self._failed(line, answer, text)
        return self._ended(line, text, is_success=answer.is_success)

    def _failed(self, line: Claimed, answer: Answer | None, text: str) -> Ended | Again:
        if line.num_failures + 1 >= self._options.most_failures:
            return self._ended(line, text, is_success=False)
        wait_s = self._options.first_backoff_s * 2**line.num_failures
        wait_s = min(wait_s, self._options.most_backoff_s) * random.uniform(0.5, 1.0)
        if answer is not None and answer.retry_after_s is not None:
            wait_s = max(wait_s, min(answer.retry_after_s, self._options.most_backoff_s))
        return self._again(line, self._clock() + wait_s, is_failure=True)

    def _ended(self, line: Claimed, text: str, *, is_success: bool) -> Ended:
        return Ended(
            position=line.position,
            claim_number=line.claim_number,
            is_success=is_success,
            text=text,
        )

    def _again(self, line: Claimed, not_before: float, *, is_failure: bool) -> Again:
        return Again(
            position=line.position,
            claim_number=line.claim_number,
            not_before=not_before,
            is_failure=is_failure,
        )

    # ---- writing -----------------------------------------------------------------------------

    async def _write(self) -> None:
        """Write results as they come, those that have come meanwhile together."""
        while True:
            first = await self._results.get()
            self._results.put_nowait(first)
            # What is being written is not given up half-way: its lines would count as in flight.
            await asyncio.shield(self._settle())

    async def _settle(self) -> None:
        async with self._writing:
            await self._settle_in_turn()
        self.wake()

    async def _settle_in_turn(self) -> None:
        by_batch: dict[str, list[Ended | Again]] = defaultdict(list)
        while not self._results.empty():
            batch_id, result = self._results.get_nowait()
            by_batch[batch_id].append(result)
        for batch_id, results in by_batch.items():
            try:
                written = await asyncio.to_thread(
                    claiming.settle,
                    self._database,
                    self.worker_id,
                    batch_id,
                    results,
                    self._clock(),
                )
                self._num_ended += sum(written)
                self.metrics.ended(*written)
            except sa.exc.SQLAlchemyError as error:
                # The lines stay claimed until the database is back.
                self._failures.warned("database", "the database does not answer: %s", error)
                for result in results:
                    self._results.put_nowait((batch_id, result))
                await asyncio.sleep(1.0)

    # ---- the lease ---------------------------------------------------------------------------

    async def _beat(self) -> None:
        interval_s = min(1.0, self._options.lease_s / 4)
        tidied_at = float("-inf")
        while True:
            try:
                await self._renew()
                now = self._clock()
                self.metrics.lost(await asyncio.to_thread(claiming.maintain, self._database, now))
                self._is_late = await asyncio.to_thread(store.is_any_late, self._database, now)
                await self._end_cancelled()
                if now - tidied_at > TIDY_INTERVAL_S:
                    await asyncio.to_thread(files.remove_abandoned, self._database, now)
                    tidied_at = now
            except sa.exc.SQLAlchemyError as error:
                self._failures.warned("database", "the database does not answer: %s", error)
            before, begun_s = self._num_ended, time.monotonic()
            await asyncio.sleep(interval_s)
            self._learn_rate(self._num_ended - before, time.monotonic() - begun_s)

    async def _renew(self) -> None:
        await asyncio.to_thread(
            claiming.renew,
            self._database,
            self.worker_id,
            self._clock(),
            self._options.lease_s,
            lines_per_s=self._lines_per_s,
            num_in_flight=len(self._in_flight),
        )

    async def _end_cancelled(self) -> None:
        batch_ids = {line.batch_id for line in self._in_flight.values()}
        if batch_ids:
            ended = await asyncio.to_thread(claiming.ended_of, self._database, batch_ids)
            for task, line in list(self._in_flight.items()):
                if line.batch_id in ended:
                    task.cancel()

    def _learn_rate(self, num_ended: int, seconds: float) -> None:
        if not num_ended and not self._in_flight:
            return
        share = min(1.0, seconds / RATE_MEMORY_S)
        rate = num_ended / seconds
        self._lines_per_s += (rate - self._lines_per_s) * (share if self._lines_per_s else 1.0)
