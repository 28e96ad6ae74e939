"""Files and batches at a frontend go to the batch process, and answers come back as they are."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
from fastapi import FastAPI

from llumsched.batch.pass_on import BatchServer
from llumsched.frontend.http.batches import batch_router
from tests.batch.servers import URL, FakeEndpoint, batching, input_file


def client_of(server: BatchServer) -> httpx.AsyncClient:
    app = FastAPI()
    app.include_router(batch_router(server))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://frontend")


def test_files_and_batches_go_to_the_batch_process(tmp_path: Path) -> None:
    async def run() -> None:
        async with batching(FakeEndpoint(), tmp_path) as process:
            server = BatchServer(str(process.client.make_url("/v1")))
            async with client_of(server) as client:
                uploaded = await client.post(
                    "/v1/files",
                    data={"purpose": "batch"},
                    files={"file": ("lines.jsonl", input_file(3))},
                )
                body = {
                    "input_file_id": uploaded.json()["id"],
                    "endpoint": URL,
                    "completion_window": "24h",
                }
                made = await client.post("/v1/batches", json=body)
                batch = await process.until(made.json()["id"], "completed")
                content = await client.get(f"/v1/files/{batch['output_file_id']}/content")
                assert len(content.text.splitlines()) == 3
                refused = await client.get("/v1/batches", params={"limit": "0"})
                assert refused.status_code == 400
                gone = await client.delete(f"/v1/files/{batch['input_file_id']}")
                assert gone.json()["deleted"] is True
            await server.close()

    asyncio.run(run())


def test_a_batch_process_that_is_away_is_said() -> None:
    async def run() -> None:
        server = BatchServer("http://127.0.0.1:9")
        async with client_of(server) as client:
            answer = await client.get("/v1/files")
        await server.close()
        assert answer.status_code == 502
        assert "127.0.0.1:9 does not answer" in answer.json()["error"]["message"]

    asyncio.run(run())
