"""Jobs and runs in the database under a virtual clock, and what each kind of job does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from llumsched.batch import claiming
from llumsched.batch.app import middleware
from llumsched.batch.database import Database
from llumsched.batch.files import NotFound
from llumsched.jobs import app as jobs_app
from llumsched.jobs import kinds, store
from llumsched.jobs.kinds import Doer
from llumsched.jobs.metrics import JobMetrics
from llumsched.jobs.runner import Runner
from llumsched.jobs.spec import SpecError, check_all, parse
from llumsched.jobs.store import Run
from tests.batch.servers import FakeEndpoint, batching, input_file

BEGIN = datetime(2027, 1, 1, 12, tzinfo=UTC).timestamp()
HOURLY = "0 0 * * * *"
HTTP = {"url": "http://127.0.0.1:1/"}


class Clock:
    """Jobs, one process, and a clock that a test moves."""

    def __init__(self, path: Path) -> None:
        self.database = Database(f"sqlite:///{path}/jobs.db")
        self.database.create()
        self.now = BEGIN + 60
        self.has("w")

    def has(self, worker_id: str, lease_s: float = 1e7) -> None:
        claiming.renew(self.database, worker_id, self.now, lease_s)

    def jobs(self, *jobs: dict[str, Any]) -> None:
        found = check_all(parse({"http": HTTP, **job}) for job in jobs)
        store.put_file(self.database, found, self.now)

    def to(self, hours: float) -> list[Run]:
        """Let it be so many hours after the beginning; what is begun then."""
        self.now = BEGIN + 3600 * hours
        return self.look()

    def look(self, worker_id: str = "w") -> list[Run]:
        store.free_lost(self.database, self.now)
        store.begin_due(self.database, self.now)
        return store.take(self.database, worker_id, self.now)

    def end(self, run: Run, *, is_success: bool = True, worker_id: str = "w") -> bool:
        return store.end(
            self.database, worker_id, run, self.now, is_success=is_success, message="said"
        )

    def states(self, name: str) -> list[str]:
        return [run["state"] for run in store.history(self.database, name, 100)]


@pytest.fixture
def clock(tmp_path: Path) -> Iterator[Clock]:
    found = Clock(tmp_path)
    yield found
    found.database.close()


def names(runs: list[Run]) -> list[str]:
    return [run.job.name + run.shard for run in runs]


def test_a_job_runs_at_its_times_and_only_once_each(clock: Clock) -> None:
    clock.jobs({"name": "a", "cron": HOURLY})
    assert clock.to(0.5) == []
    (run,) = clock.to(1)
    assert run.due_at == BEGIN + 3600
    assert clock.look() == []
    assert clock.end(run)
    assert clock.look() == []
    assert len(clock.to(2)) == 1


def test_two_processes_begin_a_run_once(clock: Clock) -> None:
    clock.jobs({"name": "a", "cron": HOURLY})
    clock.has("v")
    clock.now = BEGIN + 3600
    assert store.begin_due(clock.database, clock.now) == 1
    assert store.begin_due(clock.database, clock.now) == 0
    assert len(clock.look("v")) == 1
    assert clock.look("w") == []


@pytest.mark.parametrize(("misfire", "expected"), [("once", 1), ("all", 5), ("skip", 0)])
def test_times_missed_while_nothing_ran(clock: Clock, misfire: str, expected: int) -> None:
    clock.jobs({"name": "a", "cron": HOURLY, "misfire": misfire, "most_running": 9})
    assert len(clock.to(5.5)) == expected


def test_each_shard_has_its_run_and_the_limit_holds(clock: Clock) -> None:
    clock.jobs({"name": "a", "cron": HOURLY, "shards": ["x", "y", "z"], "most_running": 2})
    runs = clock.to(1)
    assert names(runs) == ["ax", "ay"]
    clock.end(runs[0])
    assert names(clock.look()) == ["az"]


def test_a_run_that_fails_is_tried_again_later_and_later(clock: Clock) -> None:
    clock.jobs({"name": "a", "cron": HOURLY, "retry": {"tries": 3, "wait_s": 60}})
    (run,) = clock.to(1)
    for wait_s in (60, 120):
        clock.end(run, is_success=False)
        clock.now += wait_s - 1
        assert clock.look() == []
        clock.now += 1
        (run,) = clock.look()
    clock.end(run, is_success=False)
    assert clock.states("a") == ["failed"]
    run_id = store.history(clock.database, "a", 1)[0]["run_id"]
    said = [line["message"] for line in store.describe_run(clock.database, run_id)["log"]]
    assert said[0] == "begun, try 1"
    assert said[1] == "failed, tried again in 60 s: said"
    assert said[-1] == "failed: said"


def test_outside_its_window_a_run_waits(clock: Clock) -> None:
    clock.jobs({"name": "a", "cron": "0 0 13 * * *", "window": {"from": "22:00", "to": "06:00"}})
    assert clock.to(1) == []
    assert clock.to(9.9) == []
    (run,) = clock.to(10)
    assert run.due_at == BEGIN + 3600


def test_a_diamond_of_jobs_goes_in_its_order(clock: Clock) -> None:
    clock.jobs(
        {"name": "a", "cron": HOURLY, "shards": ["x", "y"], "most_running": 2},
        {"name": "b", "after": ["a"]},
        {"name": "c", "after": ["a"]},
        {"name": "d", "after": ["b", "c"]},
    )
    first, second = clock.to(1)
    clock.end(first)
    assert clock.look() == []
    clock.end(second)
    b, c = clock.look()
    assert names([b, c]) == ["b", "c"]
    clock.end(b)
    assert clock.look() == []
    clock.end(c)
    (d,) = clock.look()
    assert d.due_at == BEGIN + 3600
    clock.end(d)
    assert clock.states("d") == ["succeeded"]


def test_what_waits_for_a_failure_is_skipped_to_the_end(clock: Clock) -> None:
    clock.jobs(
        {"name": "a", "cron": HOURLY},
        {"name": "b", "after": ["a"]},
        {"name": "c", "after": ["b"]},
    )
    (run,) = clock.to(1)
    clock.end(run, is_success=False)
    assert clock.look() == []
    assert clock.states("b") == clock.states("c") == ["skipped"]
    (run,) = clock.to(2)
    clock.end(run)
    assert names(clock.look()) == ["b"]


def test_a_run_whose_process_is_gone_is_begun_again_and_the_old_one_says_nothing(
    clock: Clock,
) -> None:
    clock.jobs({"name": "a", "cron": HOURLY})
    clock.now = BEGIN + 3600
    clock.has("v", lease_s=10)
    (lost,) = clock.look("v")
    clock.now += 11
    (again,) = clock.look()
    assert again.run_id == lost.run_id
    assert not clock.end(lost, worker_id="v")
    assert clock.end(again)
    assert clock.states("a") == ["succeeded"]


def test_a_paused_job_makes_up_for_nothing_and_runs_when_it_is_told_to(clock: Clock) -> None:
    clock.jobs({"name": "a", "cron": HOURLY, "misfire": "all"})
    store.pause(clock.database, "a", clock.now, is_paused=True)
    assert clock.to(3) == []
    store.run_now(clock.database, "a", clock.now)
    (run,) = clock.look()
    clock.end(run)
    clock.now += 60
    store.pause(clock.database, "a", clock.now, is_paused=False)
    assert clock.look() == []
    assert len(clock.to(4)) == 1


def test_a_job_that_the_file_has_no_more_is_gone_and_its_history_stays(clock: Clock) -> None:
    clock.jobs({"name": "a", "cron": HOURLY}, {"name": "b", "cron": HOURLY})
    for run in clock.to(1):
        clock.end(run)
    clock.jobs({"name": "b", "cron": HOURLY})
    assert names(clock.to(2)) == ["b"]
    assert clock.states("a") == ["succeeded"]


def test_jobs_of_the_api_stay_beside_those_of_the_file(clock: Clock) -> None:
    clock.jobs({"name": "a", "cron": HOURLY})
    store.put_one(clock.database, parse({"name": "b", "http": HTTP, "after": ["a"]}), clock.now)
    with pytest.raises(SpecError, match="no job 'a'"):
        clock.jobs()
    with pytest.raises(SpecError, match="the file's"):
        store.put_one(clock.database, parse({"name": "a", "http": HTTP, "cron": HOURLY}), 0.0)
    store.delete(clock.database, "b")
    with pytest.raises(NotFound):
        store.delete(clock.database, "b")


def test_each_kind_of_job_does_its_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "POLL_INTERVAL_S", 0.01)
    (tmp_path / "in-eu.jsonl").write_bytes(input_file(7))
    body = {"model": "m", "prompt": "{shard}"}
    specs = [
        {"name": "up", "cron": HOURLY, "scale": {"instances": 3}},
        {
            "name": "night",
            "after": ["up"],
            "shards": ["eu"],
            "batch": {
                "file": f"{tmp_path}/in-{{shard}}.jsonl",
                "output": f"{tmp_path}/out-{{shard}}.jsonl",
                "endpoint": "/v1/completions",
            },
        },
        {"name": "wrong", "after": ["up"], "batch": {"file": "/none", "endpoint": "/v1/responses"}},
    ]

    async def scenario() -> None:
        fake = FakeEndpoint()
        async with batching(fake, tmp_path) as process:
            url = f"{process.endpoint.url}/v1/completions"
            told: dict[str, Any] = {"name": "told", "after": ["night"], "shards": ["x"]}
            told["http"] = {"url": url, "body": json.dumps(body)}
            lost = {"name": "lost", "after": ["night"], "http": {"url": f"{url}/none"}}
            found = check_all(map(parse, [*specs, told, lost]))
            store.put_file(process.database, found, process.now)
            doer = Doer(
                process.database, process.endpoint, process.worker.wake, lambda: process.now
            )
            metrics = JobMetrics(process.worker.metrics.registry)
            process.worker.metrics.reads(metrics.read)
            worker_id = process.worker.worker_id
            runner = Runner(process.database, doer, worker_id, metrics, lambda: process.now)
            process.now += 3600
            claiming.renew(process.database, process.worker.worker_id, process.now, 100.0)
            for _ in found:
                await runner.look()
                await runner.until_done()
            states = {name: store.history(process.database, name, 1)[0]["state"] for name in found}
            assert states == {
                "up": "succeeded",
                "night": "succeeded",
                "wrong": "failed",
                "told": "succeeded",
                "lost": "failed",
            }
            assert fake.num_wanted == 3
            assert fake.asked["x"] == 1
            written = (tmp_path / "out-eu.jsonl").read_text(encoding="utf-8").splitlines()
            assert len(written) == 7

    asyncio.run(scenario())


def test_jobs_over_http(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = Clock(tmp_path)
        clock.jobs({"name": "a", "cron": HOURLY})
        app = web.Application(middlewares=[middleware((), ("op",))])
        jobs_app.add_routes(app, clock.database, may_change=True, clock=lambda: clock.now)
        headers = {"Authorization": "Bearer op"}
        async with TestClient(TestServer(app), headers=headers) as client:

            async def ask(method: str, path: str, body: Any = None) -> tuple[int, Any]:
                async with client.request(method, f"/llumsched{path}", json=body) as answer:
                    return answer.status, await answer.json()

            assert (await ask("PUT", "/jobs/b", {"http": HTTP, "after": ["a"]}))[0] == 200
            assert (await ask("PUT", "/jobs/c", {"http": HTTP}))[0] == 400
            assert (await ask("PUT", "/jobs/a", {"http": HTTP, "cron": HOURLY}))[0] == 400
            _, listed = await ask("GET", "/jobs")
            assert [job["name"] for job in listed["jobs"]] == ["a", "b"]
            assert listed["jobs"][0]["next_due_at"] == BEGIN + 3600
            assert (await ask("POST", "/jobs/a/pause"))[1]["is_paused"]
            status, begun = await ask("POST", "/jobs/a/run")
            assert status == 202
            assert names(clock.look()) == ["a"]
            _, run = await ask("GET", f"/runs/{begun['run_ids'][0]}")
            assert run["state"] == "running"
            assert run["cause"] == "manual"
            _, history = await ask("GET", "/jobs/a/runs?limit=5")
            assert len(history["runs"]) == 1
            assert (await ask("POST", "/jobs/a/resume"))[0] == 200
            assert (await ask("DELETE", "/jobs/b"))[0] == 200
            assert (await ask("POST", "/jobs/none/run"))[0] == 404
        async with TestClient(TestServer(app)) as stranger:
            assert (await stranger.get("/llumsched/jobs")).status == 401
        clock.database.close()

    asyncio.run(scenario())
