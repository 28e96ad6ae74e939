"""Two plain vLLM servers behind the proxy: one dies in the middle of answers, one comes, one goes.

An answer that has begun at the server that dies ends with an error event; nothing else fails.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.client import Client
from tests.e2e.servers import Server, plain_vllm

QUESTION = {"prompt": "Count from one to a hundred: one, two,", "temperature": 0}
NUM_STREAMS = 6


@pytest.fixture(scope="module")
def plain_servers(model: str, log_folder: Path) -> Iterator[list[Server]]:
    """Two at first; tests may end them and start others."""
    servers: list[Server] = []
    try:
        for number in range(2):
            # One after another: each measures the memory that is free.
            servers.append(plain_vllm(model, log_folder, name=f"plain-{number}"))
            servers[-1].await_health()
        yield servers
    finally:
        for server in servers:
            server.end()


@pytest.fixture(scope="module")
def proxy(plain_servers: list[Server], log_folder: Path) -> Iterator[Server]:
    flags = [f"--backend={server.url}" for server in plain_servers]
    arguments = ["llumsched", "serve", *flags, "--policy=round_robin", "--host=127.0.0.1"]
    server = Server("proxy", arguments, log_folder)
    try:
        await_serving(server, plain_servers)
        yield server
    finally:
        ending = server.end()
    assert not ending.left
    assert ending.status == 0


def instances(proxy: Server) -> dict[str, dict[str, Any]]:
    """What the admin API says of each server, by id."""
    try:
        answer = httpx.get(f"{proxy.url}/llumsched/instances").json()
    except httpx.TransportError:
        return {}
    return {instance["instance_id"]: instance for instance in answer["instances"]}


def await_serving(proxy: Server, servers: list[Server]) -> None:
    ids = [server.url.removeprefix("http://") for server in servers]
    proxy.await_that(
        lambda: all(instances(proxy).get(i, {}).get("state") == "serving" for i in ids),
        "the proxy has found the servers",
    )


def test_an_answer_is_the_servers_own(
    proxy: Server, plain_servers: list[Server], model: str
) -> None:
    direct, through = Client(plain_servers[0].url, model), Client(proxy.url, model)
    body = {**QUESTION, "max_tokens": 16}
    assert through.whole("/v1/completions", body) == direct.whole("/v1/completions", body)
    assert {i["engine"] for i in instances(proxy).values()} == {"vLLM"}


def test_one_is_killed_one_is_added_one_is_drained(
    proxy: Server, plain_servers: list[Server], model: str, log_folder: Path
) -> None:
    victim, survivor = plain_servers
    body = {**QUESTION, "model": model, "stream": True, "max_tokens": 200, "ignore_eos": True}
    ends: dict[int, str] = {}
    homes: dict[int, str] = {}
    begun = threading.Semaphore(0)

    def read(number: int) -> None:
        with httpx.stream("POST", f"{proxy.url}/v1/completions", json=body, timeout=120) as answer:
            homes[number] = answer.headers["x-llumsched-instance"]
            lines = []
            for line in answer.iter_lines():
                lines += [line] if line else []
                if len(lines) == 3:
                    begun.release()
            ends[number] = lines[-1]

    threads = [threading.Thread(target=read, args=(n,)) for n in range(NUM_STREAMS)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert begun.acquire(timeout=60)
    victim.kill()
    client = Client(proxy.url, model)
    for _ in range(8):
        answer = client.post("/v1/completions", {**QUESTION, "model": model, "max_tokens": 2})
        assert answer.status == 200, answer
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    lost = victim.url.removeprefix("http://")
    for number, end in ends.items():
        assert ("error" in end) == (homes[number] == lost), (homes[number], end)
        assert end == "data: [DONE]" or homes[number] == lost
    assert lost in homes.values()

    victim.end()
    third = plain_vllm(model, log_folder, name="plain-2")
    plain_servers.append(third)
    third.await_health()
    added = httpx.post(f"{proxy.url}/llumsched/backends", json={"url": third.url})
    assert added.status_code == 202
    await_serving(proxy, [third, survivor])

    leaving = survivor.url.removeprefix("http://")
    httpx.post(f"{proxy.url}/llumsched/instances/{leaving}/drain").raise_for_status()
    proxy.await_that(lambda: leaving not in instances(proxy), "the drained server has left")
    answer = client.post("/v1/completions", {**QUESTION, "model": model, "max_tokens": 2})
    assert answer.status == 200
