"""Batches in SQLite, under any order of claims, answers, deaths, cancels and deadlines."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llumsched.batch import claiming, files, store
from llumsched.batch.database import Database, batches, claims, outcomes
from llumsched.batch.states import OPEN, Event, Status, after
from llumsched.batch.store import Again, Claimed, Ended
from tests.batch.servers import URL, input_line
from tests.campaigns import examples

WORKERS = ("a", "b")
LEASE_S = 10.0
WINDOWS = {"30s": 30.0, "90s": 90.0}


class Batches(RuleBasedStateMachine):
    """The model: what each worker believes to hold, and the outcomes that were accepted."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.database = Database(f"sqlite:///{Path(self.folder.name)}/test.db")
        self.now = 1000.0
        self.held: dict[str, list[Claimed]] = {worker: [] for worker in WORKERS}
        self.lease: dict[str, float] = {}
        self.accepted: dict[tuple[str, int], str] = {}
        self.status: dict[str, Status] = {}
        self.deadline: dict[str, float] = {}
        self.total: dict[str, int] = {}
        self.answers = 0

    def teardown(self) -> None:
        self.database.close()
        self.folder.cleanup()

    @initialize(num_lines=st.integers(1, 5))
    def upload(self, num_lines: int) -> None:
        self.database.create()
        upload = files.Upload(self.database, "", "a", self.now, 100)
        upload.add([(n, input_line(n).encode()) for n in range(1, num_lines + 1)])
        self.file_id = upload.finish()["id"]
        self.num_lines = num_lines

    @precondition(lambda self: len(self.status) < 3)
    @rule(window=st.sampled_from(sorted(WINDOWS)))
    def create(self, window: str) -> None:
        batch_id = store.create(
            self.database,
            "",
            input_file_id=self.file_id,
            endpoint=URL,
            completion_window=window,
            now=self.now,
            # A name that is the same in every try.
            batch_id=f"batch-{len(self.status)}",
        )["id"]
        self.status[batch_id] = Status.IN_PROGRESS
        self.deadline[batch_id] = self.now + WINDOWS[window]
        self.total[batch_id] = self.num_lines

    @rule(worker=st.sampled_from(WORKERS))
    def renew(self, worker: str) -> None:
        claiming.renew(self.database, worker, self.now, LEASE_S)
        self.lease[worker] = self.now + LEASE_S

    @rule(worker=st.sampled_from(WORKERS), most=st.integers(1, 4))
    def claim(self, worker: str, most: int) -> None:
        if self.lease.get(worker, 0.0) <= self.now:
            self.renew(worker)
        found = claiming.claim(self.database, worker, most, self.now)
        assert len(found) <= most
        deadlines = [line.expires_at for line in found]
        assert deadlines == sorted(deadlines)
        for line in found:
            assert self.status[line.batch_id] is Status.IN_PROGRESS
            assert (line.batch_id, line.position) not in self.accepted
        self.held[worker] += found

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), kind=st.sampled_from(["ended", "failed", "again"]))
    def answer(self, data: st.DataObject, kind: str) -> None:
        worker = data.draw(st.sampled_from([w for w in WORKERS if self.held[w]]))
        line = self.held[worker].pop(data.draw(st.integers(0, len(self.held[worker]) - 1)))
        key = {"position": line.position, "claim_number": line.claim_number}
        self.answers += 1
        result: Any = Ended(**key, is_success=kind == "ended", text=str(self.answers))
        if kind == "again":
            result = Again(**key, not_before=self.now + 5, is_failure=True)
        written = claiming.settle(self.database, worker, line.batch_id, [result, result], self.now)
        if any(written):
            # The second of the two found no claim, and no line is ended twice.
            assert written == (1, 0)
            assert (line.batch_id, line.position) not in self.accepted
            assert self.status[line.batch_id] in OPEN
            self.accepted[line.batch_id, line.position] = str(self.answers)
        self._learn(line.batch_id)

    @rule(worker=st.sampled_from(WORKERS))
    def die(self, worker: str) -> None:
        """A worker dies: nobody answers for its lines, or the worker itself much later."""
        self.held[worker] = self.held[worker][:1]

    @rule(worker=st.sampled_from(WORKERS))
    def leave(self, worker: str) -> None:
        claiming.leave(self.database, worker, self.now)
        self.lease.pop(worker, None)
        self._maintained()

    @rule(seconds=st.sampled_from([1.0, 6.0, 11.0, 40.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def maintain(self) -> None:
        claiming.maintain(self.database, self.now)
        self._maintained()

    @precondition(lambda self: any(s in OPEN for s in self.status.values()))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        open_ones = sorted(b for b, status in self.status.items() if status in OPEN)
        batch_id = data.draw(st.sampled_from(open_ones))
        store.cancel(self.database, "", batch_id, self.now)
        self.status[batch_id] = after(self.status[batch_id], Event.CANCEL)
        self._learn(batch_id)

    def _maintained(self) -> None:
        for batch_id, status in self.status.items():
            if self.now >= self.deadline[batch_id]:
                self.status[batch_id] = after(status, Event.DEADLINE)
            self._learn(batch_id)

    def _learn(self, batch_id: str) -> None:
        """The state that follows from the outcomes and from what is in flight."""
        status = self.status[batch_id]
        num_ended = sum(key[0] == batch_id for key in self.accepted)
        if num_ended == self.total[batch_id]:
            status = after(status, Event.ALL_ENDED)
        with self.database.reading() as connection:
            in_flight = sa.and_(claims.c.batch_id == batch_id, claims.c.worker_id.is_not(None))
            if connection.execute(sa.select(claims).where(in_flight)).first() is None:
                status = after(status, Event.NONE_IN_FLIGHT)
        self.status[batch_id] = status

    @invariant()
    def holds(self) -> None:
        if not self.status:
            return
        with self.database.reading() as connection:
            rows = {row.batch_id: row for row in connection.execute(sa.select(batches))}
            written = {
                (row.batch_id, row.position): row.text
                for row in connection.execute(sa.select(outcomes))
            }
            claimed = {
                (row.batch_id, row.position) for row in connection.execute(sa.select(claims))
            }
        assert written == self.accepted
        assert not claimed & written.keys()
        for batch_id, row in rows.items():
            assert row.status == self.status[batch_id]
            of_batch = [key for key in written if key[0] == batch_id]
            assert row.completed + row.failed == len(of_batch)
            if row.status == Status.IN_PROGRESS:
                begun = {key for key in claimed | written.keys() if key[0] == batch_id}
                assert begun == {(batch_id, n) for n in range(1, row.claimed_up_to + 1)}
            if row.status not in OPEN:
                assert not any(key[0] == batch_id for key in claimed)


TestBatches = Batches.TestCase
TestBatches.settings = settings(
    max_examples=examples(20), stateful_step_count=30, deadline=None, print_blob=False
)
