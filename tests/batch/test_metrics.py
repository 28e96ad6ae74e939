"""Metrics of batches and jobs at `/metrics` of the batch process: each is there, and moves."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llumsched.batch import claiming
from llumsched.jobs import store as jobs_store
from llumsched.jobs.kinds import Doer
from llumsched.jobs.metrics import JobMetrics
from llumsched.jobs.runner import Runner
from llumsched.jobs.spec import check_all, parse
from llumsched.metrics import CATALOGUE, Where
from tests.batch.servers import FakeEndpoint, Process, batching, input_file, until

Values = dict[tuple[str, ...], float]


async def shown(process: Process) -> Values:
    """(name, label values in order of their names) -> value."""
    async with process.client.get("/metrics") as answer:
        assert answer.status == 200
        text = await answer.text()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def with_jobs(process: Process) -> Runner:
    """The runner of jobs, as the process has it."""
    metrics = JobMetrics(process.worker.metrics.registry)
    process.worker.metrics.reads(metrics.read)
    doer = Doer(process.database, process.endpoint, process.worker.wake, lambda: process.now)
    return Runner(process.database, doer, process.worker.worker_id, metrics, lambda: process.now)


def test_a_batch_is_seen_from_its_upload_to_its_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        failing = {"1": [500], "2": [500, 500, 500], "3": [400]}
        fake = FakeEndpoint(failing=failing, allowed=asyncio.Semaphore(0))
        async with batching(fake, tmp_path) as process:
            before = await shown(process)
            assert before["llumsched_batches", "in_progress"] == 0
            assert before["llumsched_batch_lines_total", "succeeded"] == 0
            await process.upload(b"nonsense", 400)
            file = await process.upload(input_file(6))
            batch = await process.create(file["id"])
            await until(lambda: sum(fake.asked.values()) > 0)
            during = await shown(process)
            assert during["llumsched_batches", "in_progress"] == 1
            assert during["llumsched_batch_workers",] == 1
            open_lines = [
                during["llumsched_batch_open_lines", state]
                for state in ("not_begun", "in_flight", "to_be_tried_again")
            ]
            ended = [during["llumsched_batch_lines_total", o] for o in ("succeeded", "failed")]
            assert sum(open_lines) + sum(ended) == 6
            assert fake.allowed is not None
            for _ in range(20):
                fake.allowed.release()
            await process.until(batch["id"], "completed")
            # The metrics of an answer are counted before its line is written.
            after = await shown(process)
            assert after["llumsched_batches", "completed"] == 1
            assert after["llumsched_batches", "in_progress"] == 0
            assert after["llumsched_batch_uploads_total", "accepted"] == 1
            assert after["llumsched_batch_uploads_total", "refused"] == 1
            assert after["llumsched_batch_files", "batch"] == 1
            assert after["llumsched_batch_files", "batch_output"] == 1
            assert after["llumsched_batch_lines_total", "succeeded"] == 4
            assert after["llumsched_batch_lines_total", "failed"] == 2
            assert after["llumsched_batch_retries_total", "failed"] == 3
            assert after["llumsched_batch_try_seconds_count",] == 6 + 3
            assert after["llumsched_batch_open_lines", "in_flight"] == 0

    asyncio.run(scenario())


def test_lines_of_a_process_that_is_gone_are_counted_by_who_takes_them(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with batching(FakeEndpoint(), tmp_path, works=False) as process:
            batch = await process.create((await process.upload(input_file(5)))["id"])
            claiming.renew(process.database, "gone", process.now, 1.0)
            assert len(claiming.claim(process.database, "gone", 3, process.now)) == 3
            process.now += 10
            working = asyncio.create_task(process.worker.run())
            await process.until(batch["id"], "completed")
            after = await shown(process)
            assert after["llumsched_batch_lost_lines_total",] == 3
            assert after["llumsched_batch_lines_total", "succeeded"] == 5
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    asyncio.run(scenario())


def test_lines_of_a_cancelled_batch_are_given_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        fake = FakeEndpoint(allowed=asyncio.Semaphore(0))
        async with batching(fake, tmp_path) as process:
            batch = await process.create((await process.upload(input_file(1)))["id"])
            await until(lambda: sum(fake.asked.values()) > 0)
            async with process.client.post(f"/v1/batches/{batch['id']}/cancel"):
                pass
            await process.until(batch["id"], "cancelled")
            after = await shown(process)
            assert after["llumsched_batch_retries_total", "given_back"] == 1
            assert after["llumsched_batches", "cancelled"] == 1

    asyncio.run(scenario())


def test_a_batch_that_will_be_late_is_said(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with batching(FakeEndpoint(), tmp_path, works=False) as process:
            assert (await shown(process))["llumsched_batch_late",] == 0
            await process.create((await process.upload(input_file(5)))["id"])
            claiming.renew(process.database, "slow", process.now, 9e5, lines_per_s=1e-9)
            assert (await shown(process))["llumsched_batch_late",] == 1

    asyncio.run(scenario())


def test_runs_of_jobs_are_counted_by_job_and_outcome(tmp_path: Path) -> None:
    async def scenario() -> None:
        fake = FakeEndpoint()
        async with batching(fake, tmp_path, works=False) as process:
            url = f"{process.endpoint.url}/none"
            specs: list[dict[str, Any]] = [
                {"name": "up", "cron": "0 0 * * * *", "scale": {"instances": 3}},
                {
                    "name": "lost",
                    "cron": "0 0 * * * *",
                    "http": {"url": url},
                    "retry": {"tries": 2, "wait_s": 1},
                },
                {"name": "late", "after": ["lost"], "http": {"url": url}},
            ]
            found = check_all(map(parse, specs))
            jobs_store.put_file(process.database, found, process.now)
            runner = with_jobs(process)
            # Three times pass while nobody looks, of which one is made up for.
            process.now += 2.5 * 3600
            claiming.renew(process.database, process.worker.worker_id, process.now, 1e6)
            for _ in range(2):
                await runner.look()
                await runner.until_done()
                process.now += 60
            values = await shown(process)
            assert values["llumsched_job_runs", "up", "succeeded"] == 1
            assert values["llumsched_job_runs", "lost", "failed"] == 1
            assert values["llumsched_job_runs", "late", "skipped"] == 1
            count = "llumsched_job_run_seconds_count"
            assert values[count, "up", "succeeded"] == 1
            assert values[count, "lost", "to_be_tried_again"] == 1
            assert values[count, "lost", "failed"] == 1
            assert (count, "late", "failed") not in values
            for name in ("up", "lost"):
                assert values["llumsched_job_misfires_total", name] == 3
            assert values["llumsched_job_lost_runs_total",] == 0

    asyncio.run(scenario())


def test_runs_of_a_process_that_is_gone_are_counted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with batching(FakeEndpoint(), tmp_path, works=False) as process:
            found = check_all(
                [parse({"name": "a", "at": ["2050-01-01T00:00:00"], "scale": {"instances": 1}})]
            )
            jobs_store.put_file(process.database, found, process.now)
            jobs_store.run_now(process.database, "a", process.now)
            claiming.renew(process.database, "gone", process.now, 1.0)
            assert len(jobs_store.take(process.database, "gone", process.now)) == 1
            runner = with_jobs(process)
            assert (await shown(process))["llumsched_job_runs", "a", "running"] == 1
            process.now += 10
            claiming.renew(process.database, process.worker.worker_id, process.now, 1e6)
            await runner.look()
            await runner.until_done()
            values = await shown(process)
            assert values["llumsched_job_lost_runs_total",] == 1
            assert values["llumsched_job_runs", "a", "succeeded"] == 1
            assert ("llumsched_job_runs", "a", "running") not in values

    asyncio.run(scenario())


@pytest.mark.parametrize("keys", [(), ("key",)])
def test_all_that_the_catalogue_names_is_shown_also_without_a_key(
    tmp_path: Path, keys: tuple[str, ...]
) -> None:
    async def scenario() -> None:
        async with batching(FakeEndpoint(), tmp_path, works=False, keys=keys) as process:
            with_jobs(process)
            async with process.client.get("/metrics") as answer:
                page = await answer.text()
        for spec in CATALOGUE:
            if spec.where is Where.BATCH:
                assert f"# TYPE {spec.exposed_name} {spec.kind}" in page, spec.name

    asyncio.run(scenario())
