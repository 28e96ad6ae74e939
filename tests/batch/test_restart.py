"""The whole process is killed in the middle of a batch, twice, and started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp.test_utils import TestServer

from tests.batch.servers import URL, FakeEndpoint, input_file, web_form

NUM_LINES = 300
LONG_S = 240.0


@pytest.mark.slow
def test_every_line_is_answered_once_though_the_process_is_killed(tmp_path: Path) -> None:
    async def scenario() -> None:
        fake = FakeEndpoint(answer_s=0.02)
        server = TestServer(fake.app())
        await server.start_server()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        batch_id = ""
        async with aiohttp.ClientSession(url) as client, asyncio.timeout(LONG_S):
            for num_before_death in (40, 150):
                async with started(port, server, tmp_path) as process:
                    if not batch_id:
                        batch_id = await _create(client)
                    await _until_ended(client, batch_id, num_before_death)
                    os.kill(process.pid, signal.SIGKILL)
            async with started(port, server, tmp_path):
                await _until_ended(client, batch_id, NUM_LINES)
                async with client.get(f"/v1/batches/{batch_id}") as answer:
                    batch = await answer.json()
                async with client.get(f"/v1/files/{batch['output_file_id']}/content") as answer:
                    lines = (await answer.text()).splitlines()
                async with client.get("/metrics") as answer:
                    page = await answer.text()
        assert batch["status"] == "completed"
        assert batch["request_counts"]["failed"] == 0
        assert len(lines) == NUM_LINES
        for number, line in enumerate(lines):
            assert f'"custom_id":"c{number}"' in line
            assert f"answer {number}" in line
        assert 'llumsched_batches{state="completed"} 1.0' in page
        assert "llumsched_job_lost_runs_total 0.0" in page, "jobs are a part of the process"
        await server.close()

    asyncio.run(scenario())


@contextlib.asynccontextmanager
async def started(
    port: int, server: TestServer, folder: Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "llumsched", "batch", f"--url=http://127.0.0.1:{server.port}"),
        *(f"--port={port}", f"--database=sqlite:///{folder}/batch.db", "--lease=1"),
        "--most-in-flight=16",
    )
    try:
        async with aiohttp.ClientSession() as client:
            while True:
                with contextlib.suppress(aiohttp.ClientConnectorError):
                    async with client.get(f"http://127.0.0.1:{port}/health"):
                        break
                assert process.returncode is None
                await asyncio.sleep(0.1)
        yield process
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        await process.wait()


async def _create(client: aiohttp.ClientSession) -> str:
    async with client.post("/v1/files", data=web_form(input_file(NUM_LINES))) as answer:
        file_id = (await answer.json())["id"]
    body = {"input_file_id": file_id, "endpoint": URL, "completion_window": "24h"}
    async with client.post("/v1/batches", json=body) as answer:
        return str((await answer.json())["id"])


async def _until_ended(client: aiohttp.ClientSession, batch_id: str, num_lines: int) -> None:
    """Wait until so many lines have their outcomes."""
    num_ended = -1
    while num_ended < num_lines:
        await asyncio.sleep(0.02)
        async with client.get(f"/v1/batches/{batch_id}") as answer:
            counts = (await answer.json())["request_counts"]
        num_ended = counts["completed"] + counts["failed"]
