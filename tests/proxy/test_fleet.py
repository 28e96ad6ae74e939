"""Servers that come, leave, fail and come back while the proxy serves."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from aiohttp.test_utils import TestServer

from llumsched.commands.status import page
from llumsched.proxy import serve
from llumsched.proxy.backends import Backend, BackendError, parse_backend, read_backends
from llumsched.proxy.breaker import CircuitBreaker
from tests.proxy.servers import FakeServer, proxied, until, watch_often


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    watch_often(monkeypatch)


def test_a_drained_server_ends_its_answers_and_is_forgotten() -> None:
    async def run() -> None:
        leaving, other = FakeServer(allowed=asyncio.Semaphore(0)), FakeServer()
        async with proxied(leaving, other, config="policy: round_robin") as proxy:
            answers = [await proxy.ask() for _ in range(2)]
            path = f"/llumsched/instances/{leaving.server_id}/drain"
            assert (await proxy.client.post(path)).status == 202
            for _ in range(4):
                answer = await proxy.ask()
                assert await answer.read() == other.whole()
            assert leaving.server_id in proxy.fleet.servers
            assert leaving.allowed is not None
            for _ in range(10):
                leaving.allowed.release()
            bodies = [await answer.read() for answer in answers]
            assert leaving.whole() in bodies
            await until(lambda: leaving.server_id not in proxy.fleet.servers)

    asyncio.run(run())


def test_a_server_is_added_while_others_serve() -> None:
    async def run() -> None:
        first, second = FakeServer(), FakeServer()
        async with (
            proxied(first, config="policy: round_robin") as proxy,
            TestServer(second.app()) as http,
        ):
            second.http = http
            added = await proxy.client.post("/llumsched/backends", json={"url": second.url})
            assert added.status == 202
            again = await proxy.client.post("/llumsched/backends", json={"url": second.url})
            assert again.status == 400
            await proxy.until_serving(second)
            for _ in range(4):
                await (await proxy.ask()).read()
            assert second.bodies

    asyncio.run(run())


def test_a_server_that_was_away_serves_again() -> None:
    async def run() -> None:
        server, other = FakeServer(), FakeServer()
        async with proxied(server, other, config="policy: round_robin") as proxy:
            server.health = 500
            seen = proxy.fleet.servers[server.server_id]
            await until(lambda: not seen.is_there)
            assert "500" in seen.last_failure
            server.health = 200
            await until(lambda: seen.is_there)
            for _ in range(4):
                await (await proxy.ask()).read()
            assert server.bodies

    asyncio.run(run())


def test_the_list_is_read_again_when_its_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        monkeypatch.setattr(serve, "RELOAD_INTERVAL_S", 0.01)
        first, second = FakeServer(), FakeServer()
        async with proxied(first) as proxy, TestServer(second.app()) as http:
            second.http = http
            path = tmp_path / "servers.yaml"
            path.write_text(f"backends: ['{first.url}']\n", encoding="utf-8")
            reloading = asyncio.create_task(serve._reload(path, proxy.fleet))
            await asyncio.sleep(0)
            path.write_text("backends: nonsense\n", encoding="utf-8")
            await until(lambda: "not read again" in caplog.text)
            assert list(proxy.fleet.servers) == [first.server_id]
            path.write_text(f"backends: ['{second.url}', ]\n", encoding="utf-8")
            await until(lambda: list(proxy.fleet.servers) == [second.server_id])
            reloading.cancel()

    asyncio.run(run())


def test_status_shows_the_servers() -> None:
    async def run() -> None:
        server = FakeServer(metrics="vllm:num_requests_running 3\nvllm:num_requests_waiting 1\n")
        async with proxied(server) as proxy:
            await until(lambda: proxy.fleet.servers[server.server_id].engine == "vLLM")
            cluster = await (await proxy.client.get("/llumsched/instances")).json()
            requests = await (await proxy.client.get("/llumsched/requests")).json()
            shown = "\n".join(page(cluster, requests["requests"]))
            assert server.server_id in shown
            assert "policy least_requests" in shown
            moved = await proxy.client.post("/llumsched/migrations", json={"request_id": "x"})
            assert moved.status == 409

    asyncio.run(run())


def test_metrics_say_which_server_is_up() -> None:
    async def run() -> None:
        server = FakeServer()
        async with proxied(server) as proxy:
            await (await proxy.ask()).read()
            text = await (await proxy.client.get("/metrics")).text()
            assert f'llumsched_proxy_server_up{{server="{server.server_id}"}} 1.0' in text
            name = "llumsched_proxy_time_to_first_byte_seconds_count"
            assert f'{name}{{server="{server.server_id}"}} 1.0' in text
            assert (await proxy.client.get("/health")).status == 200

    asyncio.run(run())


def test_a_breaker_opens_after_failures_in_a_row_and_waits_longer_each_time() -> None:
    breaker = CircuitBreaker(max_failures=2)
    assert not breaker.failed(0.0)
    breaker.succeeded()
    assert not breaker.failed(1.0)
    assert breaker.failed(1.0)
    assert breaker.is_open
    assert not breaker.may_try(1.4)
    assert breaker.may_try(1.5)
    breaker.unwell(1.5)
    assert not breaker.may_try(2.4)
    assert breaker.may_try(2.5)
    breaker.close()
    assert breaker.retry_at_s is None
    assert breaker.failed(3.0, is_dead=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("10.0.0.1:8000", "whole address"),
        ("http://a,weight=0", "weight must be"),
        ("http://a,role=cook", "mixed, prefill, decode"),
        ("http://a,wieght=2", "weight"),
        ("http://a,b", "NAME=VALUE"),
        ("http://a,api_key_env=NOT_THERE", "NOT_THERE"),
    ],
)
def test_a_mistake_in_a_backend_names_the_fix(text: str, said: str) -> None:
    with pytest.raises(BackendError, match=said):
        parse_backend(text)


def test_a_file_of_backends_holds_the_configuration_too(tmp_path: Path) -> None:
    path = tmp_path / "servers.yaml"
    path.write_text(
        "policy: infaas\nbackends:\n - http://a:1/v1\n - {url: 'http://b:2', weight: 2}\n",
        encoding="utf-8",
    )
    backends, config = read_backends(path)
    assert backends == (Backend(url="http://a:1"), Backend(url="http://b:2", weight=2.0))
    assert config.strip() == "policy: infaas"


@pytest.mark.parametrize("text", ["", "backends: []", "backends: [http://a, http://a]", "a: ["])
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "servers.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BackendError, match=r"servers\.yaml"):
        read_backends(path)


def test_serve_says_a_mistake_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serve.main(["--backend", "nowhere"])
    assert "whole address" in capsys.readouterr().err


def test_a_port_in_use_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        argv = ["--backend=http://127.0.0.1:9", "--host=127.0.0.1", f"--port={port}"]
        assert serve.main(argv) == 1
    shown = capsys.readouterr()
    assert f"cannot listen at 127.0.0.1:{port}" in shown.err
    assert "Traceback" not in shown.out + shown.err
