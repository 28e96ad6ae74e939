"""Files and batches behind the proxy: passed on as they are, uploads and downloads as streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from tests.batch.servers import URL, FakeEndpoint, batching, input_file, web_form
from tests.proxy.servers import FakeServer, proxied


def test_files_and_batches_go_to_the_batch_process(tmp_path: Path) -> None:
    async def run() -> None:
        async with batching(FakeEndpoint(), tmp_path) as process:
            url = str(process.client.make_url("/"))
            async with proxied(FakeServer(), batch_url=url, api_keys=["k"]) as proxy:
                headers = {"Authorization": "Bearer k"}
                refused = await proxy.client.post("/v1/files", data=web_form(input_file(3)))
                assert refused.status == 401
                form = web_form(input_file(3))
                uploaded = await proxy.client.post("/v1/files", data=form, headers=headers)
                file_id = (await uploaded.json())["id"]
                body = {"input_file_id": file_id, "endpoint": URL, "completion_window": "24h"}
                made = await proxy.client.post("/v1/batches", json=body, headers=headers)
                batch = await process.until((await made.json())["id"], "completed")
                path = f"/v1/files/{batch['output_file_id']}/content"
                content = await (await proxy.client.get(path, headers=headers)).text()
                assert len(content.splitlines()) == 3
                path = "/v1/batches?limit=0"
                assert (await proxy.client.get(path, headers=headers)).status == 400
                # What is sent to servers goes where it went.
                answer = await proxy.ask(headers=headers)
                assert (await answer.read()).endswith(b"[DONE]\n\n")

    asyncio.run(run())


def test_an_upload_without_a_length_is_a_stream_through_the_proxy(tmp_path: Path) -> None:
    async def lines() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
        yield b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for number in range(300):
            yield input_file(number + 1).splitlines()[-1] + b"\n"
            await asyncio.sleep(0)
        yield b"\r\n--x--\r\n"

    async def run() -> None:
        async with batching(FakeEndpoint(), tmp_path, works=False) as process:
            url = str(process.client.make_url("/"))
            async with proxied(FakeServer(), batch_url=url) as proxy:
                headers = {"Content-Type": "multipart/form-data; boundary=x"}
                answer = await proxy.client.post("/v1/files", data=lines(), headers=headers)
                assert (await answer.json())["status"] == "processed"

    asyncio.run(run())


def test_a_batch_process_that_is_away_is_said() -> None:
    async def run() -> None:
        async with proxied(FakeServer(), batch_url="http://127.0.0.1:9") as proxy:
            answer = await proxy.client.get("/v1/files")
            assert answer.status == 502
            assert "127.0.0.1:9 does not answer" in (await answer.json())["error"]["message"]

    asyncio.run(run())
