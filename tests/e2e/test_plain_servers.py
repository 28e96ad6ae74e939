"""Two plain vLLM servers and llama.cpp's behind the proxy: one comes, one goes, one dies in the
middle of answers.

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
from tests.llama_cpp import write_model

QUESTION = {"prompt": "Count from one to a hundred: one, two,", "temperature": 0}
NUM_STREAMS = 6


@pytest.fixture(scope="module")
def proxy(plain_server: Server, log_folder: Path) -> Iterator[Server]:
    backend = f"--backend={plain_server.url}"
    arguments = ["llumsched", "serve", backend, "--policy=round_robin", "--host=127.0.0.1"]
    server = Server("proxy", arguments, log_folder)
    try:
        await_serving(server, plain_server)
        yield server
    finally:
        ending = server.end()
    assert ending.status == 0


@pytest.fixture(scope="module")
def other(plain_server: Server, model: str, log_folder: Path) -> Iterator[Server]:
    """A second plain server, which the proxy does not know of."""
    server = plain_vllm(model, log_folder, name="other")
    try:
        server.await_health()
        yield server
    finally:
        server.end()


@pytest.fixture(scope="module")
def llama_cpp(model: str, log_folder: Path) -> Iterator[Server]:
    """A server of llama.cpp, by the same name of another model."""
    pytest.importorskip("xllamacpp", reason="llama.cpp's server is of the package xllamacpp")
    write_model(log_folder / "tiny.gguf")
    arguments = ["tests.llama_cpp", str(log_folder / "tiny.gguf"), model]
    server = Server("llama.cpp", arguments, log_folder)
    try:
        server.await_health()
        yield server
    finally:
        server.end()


def id_of(server: Server) -> str:
    return server.url.removeprefix("http://")


def instances(proxy: Server) -> dict[str, dict[str, Any]]:
    """The admin API's words on each server, by id."""
    try:
        answer = httpx.get(f"{proxy.url}/llumsched/instances").json()
    except httpx.TransportError:
        return {}
    return {instance["instance_id"]: instance for instance in answer["instances"]}


def await_serving(proxy: Server, *servers: Server) -> None:
    ids = [id_of(server) for server in servers]
    proxy.await_that(
        lambda: all(instances(proxy).get(i, {}).get("state") == "serving" for i in ids),
        "the proxy has found the servers",
    )


def add(proxy: Server, server: Server) -> None:
    answer = httpx.post(f"{proxy.url}/llumsched/backends", json={"url": server.url})
    assert answer.status_code == 202
    await_serving(proxy, server)


def answers(proxy: Server, model: str, number: int) -> None:
    """Each of so many short questions is answered."""
    client = Client(proxy.url, model)
    for _ in range(number):
        answer = client.post("/v1/completions", {**QUESTION, "model": model, "max_tokens": 2})
        assert answer.status == 200, answer


def test_an_answer_is_the_servers_own(proxy: Server, plain_server: Server, model: str) -> None:
    direct, through = Client(plain_server.url, model), Client(proxy.url, model)
    body = {**QUESTION, "max_tokens": 16}
    assert through.whole("/v1/completions", body) == direct.whole("/v1/completions", body)
    assert {i["engine"] for i in instances(proxy).values()} == {"vLLM"}


def test_one_is_added_one_is_drained_one_is_killed(
    proxy: Server, plain_server: Server, other: Server, llama_cpp: Server, model: str
) -> None:
    add(proxy, other)
    add(proxy, llama_cpp)
    leaving = id_of(plain_server)
    httpx.post(f"{proxy.url}/llumsched/instances/{leaving}/drain").raise_for_status()
    proxy.await_that(lambda: leaving not in instances(proxy), "the drained server has left")
    answers(proxy, model, 2)
    add(proxy, plain_server)

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
    other.kill()
    answers(proxy, model, 8)
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    lost = id_of(other)
    assert set(homes.values()) == {lost, id_of(plain_server), id_of(llama_cpp)}
    for number, end in ends.items():
        assert (end == "data: [DONE]") == (homes[number] != lost), (homes[number], end)
        assert ("error" in end) == (homes[number] == lost), (homes[number], end)
