"""The same batches on PostgreSQL, where a test is given one: LLUMSCHED_POSTGRESQL=postgresql://…"""

from __future__ import annotations

import os
import threading
from collections import Counter

import pytest
import sqlalchemy as sa

from llumsched.batch import claiming, files, store
from llumsched.batch.database import Database, metadata
from llumsched.batch.metrics import BatchMetrics
from llumsched.batch.store import Ended
from llumsched.jobs import store as jobs_store
from llumsched.jobs.metrics import JobMetrics
from llumsched.jobs.spec import parse
from tests.batch.servers import URL, input_line

URL_OF_DATABASE = os.environ.get("LLUMSCHED_POSTGRESQL", "")
pytestmark = pytest.mark.skipif(not URL_OF_DATABASE, reason="LLUMSCHED_POSTGRESQL names none")
NUM_LINES = 200
NOW = 1000.0
JOB = {"name": "a", "cron": "0 * * * * *", "http": {"url": "http://a"}}


@pytest.fixture
def database() -> Database:
    found = Database(URL_OF_DATABASE)
    with found.writing() as connection:
        metadata.drop_all(connection)
    found.create()
    return found


def test_several_workers_at_once_end_every_line_once(database: Database) -> None:
    upload = files.Upload(database, "", "a", NOW, 1000)
    upload.add([(n, input_line(n).encode()) for n in range(1, NUM_LINES + 1)])
    file_id = upload.finish()["id"]
    batch_ids = [
        store.create(
            database,
            "",
            input_file_id=file_id,
            endpoint=URL,
            completion_window=f"{n}h",
            now=NOW,
        )["id"]
        for n in (1, 2)
    ]
    claimed: Counter[tuple[str, int]] = Counter()

    def work(worker_id: str) -> None:
        claiming.renew(database, worker_id, NOW, 60.0)
        while found := claiming.claim(database, worker_id, 7, NOW):
            for batch_id in {line.batch_id for line in found}:
                results = [
                    Ended(
                        position=line.position,
                        claim_number=line.claim_number,
                        is_success=True,
                        text="{}",
                    )
                    for line in found
                    if line.batch_id == batch_id
                ]
                claiming.settle(database, worker_id, batch_id, results, NOW)
                claiming.maintain(database, NOW)
            claimed.update((line.batch_id, line.position) for line in found)

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == 2 * NUM_LINES
    assert set(claimed.values()) == {1}
    for batch_id in batch_ids:
        batch = store.get(database, "", batch_id, NOW)
        assert batch["status"] == "completed"
        row = files.get(database, "", batch["output_file_id"])
        assert b"".join(files.content(database, row)).count(b"\n") == NUM_LINES


def test_jobs_begin_once(database: Database) -> None:
    job = parse(JOB)
    jobs_store.put_file(database, {"a": job}, NOW)
    claiming.renew(database, "w", NOW, 1000.0)
    assert jobs_store.begin_due(database, NOW + 60) == 1
    assert jobs_store.begin_due(database, NOW + 60) == 0
    (run,) = jobs_store.take(database, "w", NOW + 60)
    assert jobs_store.end(database, "w", run, NOW + 61, is_success=True, message="")
    with database.reading() as connection:
        assert connection.scalar(sa.select(jobs_store.runs.c.state)) == "succeeded"


def test_states_are_read_for_metrics(database: Database) -> None:
    upload = files.Upload(database, "", "a", NOW, 1000)
    upload.add([(n, input_line(n).encode()) for n in range(1, 8)])
    file_id = upload.finish()["id"]
    store.create(database, "", input_file_id=file_id, endpoint=URL, now=NOW)
    claiming.renew(database, "w", NOW, 60.0)
    assert len(claiming.claim(database, "w", 3, NOW)) == 3
    with database.writing() as connection:
        jobs_store.put(connection, parse(JOB), "api", NOW)
    jobs_store.run_now(database, "a", NOW)
    metrics = BatchMetrics(database, lambda: NOW)
    metrics.reads(JobMetrics(metrics.registry).read)
    page = metrics.page().decode()
    for shown in (
        'llumsched_batches{state="in_progress"} 1.0',
        'llumsched_batch_open_lines{state="not_begun"} 4.0',
        'llumsched_batch_open_lines{state="in_flight"} 3.0',
        "llumsched_batch_workers 1.0",
        'llumsched_job_runs{job_name="a",state="waiting"} 1.0',
    ):
        assert shown in page
