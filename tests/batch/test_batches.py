"""Files and batches over HTTP, against an endpoint that fails as a test says."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import openai
import pytest
import sqlalchemy as sa

from llumsched.batch import claiming
from llumsched.batch.database import files, lines
from tests.batch.servers import (
    FAST,
    LONG_S,
    FakeEndpoint,
    Process,
    batching,
    input_file,
    input_line,
    until,
)


def run(scenario: object) -> None:
    asyncio.run(scenario())  # type: ignore[operator]


def test_openai_s_own_client_gets_every_answer_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        fake = FakeEndpoint(failing={"3": [503], "4": [400], "5": [500, 500, 500]})
        async with batching(fake, tmp_path) as process:
            url = str(process.client.make_url("/v1"))
            async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
                file = await client.files.create(file=("a.jsonl", input_file(20)), purpose="batch")
                batch = await client.batches.create(
                    input_file_id=file.id,
                    endpoint="/v1/completions",
                    completion_window="24h",
                    metadata={"who": "me"},
                )
                assert batch.metadata == {"who": "me"}
                await process.until(batch.id, "completed")
                batch = await client.batches.retrieve(batch.id)
                assert batch.request_counts is not None
                assert batch.request_counts.completed == 18
                assert batch.request_counts.failed == 2
                assert batch.output_file_id is not None
                assert batch.error_file_id is not None
                text = (await client.files.content(batch.output_file_id)).text
                answers = [json.loads(line) for line in text.splitlines()]
                listed = [found.id async for found in client.batches.list(limit=1)]
                assert listed == [batch.id]
                names = [found.filename async for found in client.files.list(limit=2)]
                assert len(names) == 3
            expected = [n for n in range(20) if n not in (4, 5)]
            assert [found["custom_id"] for found in answers] == [f"c{n}" for n in expected]
            for number, found in zip(expected, answers, strict=True):
                assert found["response"]["status_code"] == 200
                assert found["response"]["body"]["choices"][0]["text"] == f"answer {number}"
            failed = await process.lines(batch.error_file_id)
            statuses = {found["custom_id"]: found["response"]["status_code"] for found in failed}
            assert statuses == {"c4": 400, "c5": 500}
            assert fake.asked["3"] == 2
            assert fake.asked["4"] == 1
            assert fake.asked["5"] == FAST.most_failures
            assert {found["X-Request-Priority"] for found in fake.headers} == {"low"}

    run(scenario)


def test_an_upload_names_the_lines_that_are_wrong_and_keeps_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with batching(FakeEndpoint(), tmp_path, works=False, most_lines=50) as process:
            wrong = f'{input_line(0)}\n\n{{"custom_id": 3}}\n{input_line(1)}\nnothing'.encode()
            error = (await process.upload(wrong, status=400))["error"]
            assert "line 3: " in error["message"]
            assert "line 5: " in error["message"]
            assert "line 4" not in error["message"]
            twice = f"{input_line(0)}\n{input_line(1)}\n{input_line(0)}\n".encode()
            error = (await process.upload(twice, status=400))["error"]
            assert "line 3: 'custom_id' 'c0' is that of line 1 as well" in error["message"]
            assert "no lines" in (await process.upload(b"\n\n", status=400))["error"]["message"]
            many = (await process.upload(input_file(51), status=400))["error"]["message"]
            assert "at most 50 lines" in many
            all_wrong = b"x\n" * 45
            assert "and 25 more" in (await process.upload(all_wrong, 400))["error"]["message"]
            with process.database.reading() as connection:
                for table in (files, lines):
                    assert connection.execute(sa.select(table)).all() == []

    run(scenario)


def test_a_file_comes_back_as_it_was_sent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with batching(FakeEndpoint(), tmp_path, works=False) as process:
            file = await process.upload(input_file(1200))
            sent = [json.loads(line) for line in input_file(1200).splitlines()]
            assert await process.lines(file["id"]) == sent
            assert file["bytes"] == len(input_file(1200)) + 1
            async with process.client.delete(f"/v1/files/{file['id']}") as answer:
                assert (await answer.json())["deleted"]
            await process.get(f"/v1/files/{file['id']}", status=404)

    run(scenario)


def test_a_batch_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with batching(FakeEndpoint(), tmp_path, works=False) as process:
            file = await process.upload(input_file(2))
            await process.create("file-none", status=404)
            for changes in (
                {"endpoint": "/v1/nothing"},
                {"completion_window": "soon"},
                {"metadata": {"a": 1}},
                {"colour": "red"},
            ):
                await process.create(file["id"], status=400, **changes)
            failed = await process.create(file["id"], endpoint="/v1/embeddings")
            assert failed["status"] == "failed"
            assert failed["errors"]["data"][0]["code"] == "mismatched_endpoint"

    run(scenario)


def test_cancelling_ends_what_is_in_flight_and_keeps_what_was_answered(tmp_path: Path) -> None:
    async def scenario() -> None:
        fake = FakeEndpoint(allowed=asyncio.Semaphore(3))
        async with batching(fake, tmp_path) as process:
            file = await process.upload(input_file(50))
            batch = await process.create(file["id"])
            async with asyncio.timeout(LONG_S):
                while batch["request_counts"]["completed"] < 3:
                    batch = await process.get(f"/v1/batches/{batch['id']}")
            partial = batch["llumsched"]["partial_output_file_id"]
            assert len(await process.lines(partial)) == 3
            async with process.client.delete(f"/v1/files/{file['id']}") as answer:
                assert answer.status == 409
            async with process.client.post(f"/v1/batches/{batch['id']}/cancel") as answer:
                assert (await answer.json())["status"] in ("cancelling", "cancelled")
            batch = await process.until(batch["id"], "cancelled")
            assert len(await process.lines(batch["output_file_id"])) == 3
            assert batch["request_counts"] == {"total": 50, "completed": 3, "failed": 0}
            await until(lambda: fake.num_left > 0)
            async with process.client.post(f"/v1/batches/{batch['id']}/cancel") as answer:
                assert answer.status == 409

    run(scenario)


def test_a_batch_whose_time_is_over_says_so_of_each_line_without_an_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with batching(FakeEndpoint(allowed=asyncio.Semaphore(2)), tmp_path) as process:
            batch = await process.create((await process.upload(input_file(5)))["id"])
            async with asyncio.timeout(LONG_S):
                while batch["request_counts"]["completed"] < 2:
                    batch = await process.get(f"/v1/batches/{batch['id']}")
            process.now += 86_401
            batch = await process.until(batch["id"], "expired")
            answered = await process.lines(batch["output_file_id"])
            expired = await process.lines(batch["error_file_id"])
            assert {found["error"]["code"] for found in expired} == {"batch_expired"}
            names = [found["custom_id"] for found in (*answered, *expired)]
            assert sorted(names) == [f"c{n}" for n in range(5)]

    run(scenario)


def test_an_endpoint_that_is_away_costs_no_line_a_try(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with batching(FakeEndpoint(), tmp_path) as process:
            away = process.endpoint.url
            process.endpoint.url = "http://127.0.0.1:9"
            batch = await process.create((await process.upload(input_file(4)))["id"])
            for _ in range(20):
                process.now += 1
                await asyncio.sleep(0.02)
            process.endpoint.url = away
            async with asyncio.timeout(LONG_S):
                while batch["status"] == "in_progress":
                    process.now += 0.1
                    await asyncio.sleep(0.02)
                    batch = await process.get(f"/v1/batches/{batch['id']}")
            assert batch["request_counts"]["completed"] == 4

    run(scenario)


def test_lines_of_a_worker_that_is_gone_are_another_s_once_its_lease_is_over(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with batching(FakeEndpoint(), tmp_path) as process:
            batch = await process.create((await process.upload(input_file(3)))["id"])
            await process.until(batch["id"], "completed")

    run(scenario)

    async def with_a_dead_one() -> None:
        fake = FakeEndpoint()
        async with batching(fake, tmp_path, works=False) as process:
            now = process.now
            batch = await process.create((await process.upload(input_file(3)))["id"])
            claiming.renew(process.database, "dead", now, 10.0)
            assert len(claiming.claim(process.database, "dead", 2, now)) == 2
            working = asyncio.create_task(process.worker.run())
            await until(lambda: fake.asked.total() > 0)
            assert fake.asked == {"2": 1}
            process.now += 11
            await process.until(batch["id"], "completed")
            assert fake.asked == {"0": 1, "1": 1, "2": 1}
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    run(with_a_dead_one)


def test_the_earliest_deadline_goes_first_and_the_finish_is_predicted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with batching(FakeEndpoint(), tmp_path, works=False) as process:
            file = (await process.upload(input_file(4)))["id"]
            late = await process.create(file, completion_window="2d")
            soon = await process.create(file, completion_window="1h")
            now, database = process.now, process.database
            claiming.renew(database, "w", now, 1e6, lines_per_s=0.002)
            found = claiming.claim(database, "w", 6, now)
            assert [line.batch_id for line in found] == [soon["id"]] * 4 + [late["id"]] * 2
            soon = await process.get(f"/v1/batches/{soon['id']}")
            late = await process.get(f"/v1/batches/{late['id']}")
            assert soon["llumsched"]["predicted_finish_at"] == int(now) + 2000
            assert soon["llumsched"]["is_in_time"]
            assert late["llumsched"]["predicted_finish_at"] == int(now) + 4000

    run(scenario)


def test_a_client_sees_the_files_and_batches_of_its_own_key(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with batching(FakeEndpoint(), tmp_path, works=False, keys=("a", "b")) as process:
            await process.upload(input_file(1), status=401)
            file = await process.upload(input_file(1), Authorization="Bearer a")
            assert await _status(process, file["id"], "a") == 200
            assert await _status(process, file["id"], "b") == 404
            assert await _status(process, file["id"], "c") == 401

    async def _status(process: Process, file_id: str, key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        async with process.client.get(f"/v1/files/{file_id}", headers=headers) as answer:
            return answer.status

    run(scenario)


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=x"])
def test_what_is_no_upload_is_a_client_s_mistake(tmp_path: Path, content_type: str) -> None:
    async def scenario() -> None:
        async with batching(FakeEndpoint(), tmp_path, works=False) as process:
            headers = {"Content-Type": content_type}
            async with process.client.post("/v1/files", data=b"{}", headers=headers) as answer:
                assert answer.status == 400, await answer.text()

    run(scenario)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"endpoint": "\\ud800"}']
)
def test_what_is_no_batch_is_a_client_s_mistake(tmp_path: Path, body: bytes) -> None:
    async def scenario() -> None:
        async with batching(FakeEndpoint(), tmp_path, works=False) as process:
            headers = {"Content-Type": "text/x; charset=nonsense"}
            async with process.client.post("/v1/batches", data=body, headers=headers) as answer:
                assert answer.status == 400, await answer.text()
                assert (await answer.json())["error"]["message"]

    run(scenario)
