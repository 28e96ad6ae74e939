"""The proxy's admin API: who reaches it, what it refuses in words, and policies that fail."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import aiohttp
import pytest

from llumsched.commands import CommandError
from llumsched.commands._admin import AdminClient
from llumsched.proxy import serve
from tests.proxy.servers import FakeServer, Proxied, proxied

BROKEN = (
    "class Broken:\n    def dispatch(self, request, cluster):\n        raise KeyError('typo')\n"
)


async def answers(*flags: str, key: str | None = None) -> tuple[int, int]:
    """Statuses of the admin API and of an unknown path, of a server with these flags."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    parser = serve._parser()
    arguments = parser.parse_args(["--backend=http://127.0.0.1:9", f"--port={port}", *flags])
    running = asyncio.create_task(serve._serve(arguments, *serve._plan(arguments)))
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    url = f"http://127.0.0.1:{port}"
    try:
        async with aiohttp.ClientSession(headers=headers) as client, asyncio.timeout(20):
            while True:
                with suppress(aiohttp.ClientConnectionError):
                    async with client.get(f"{url}/llumsched/instances") as admin:
                        break
                assert not running.done()
                await asyncio.sleep(0.01)
            async with client.get(f"{url}/nowhere") as unknown:
                return admin.status, unknown.status
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        ([], 200, ""),
        (["--host=0.0.0.0"], 404, "serves no admin API"),
        (["--host=0.0.0.0", "--admin-api=on"], 200, "give --api-key as well"),
        (["--admin-api=off"], 404, ""),
    ],
)
def test_a_stranger_does_not_reach_it_unless_an_operator_says_so(
    flags: list[str], status: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "llumsched.proxy.serve")
    assert asyncio.run(answers(*flags)) == (status, 404)
    assert (said in caplog.text) if said else not caplog.messages


def test_the_key_of_the_environment_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of the other front door; whoever set it takes the server for closed."""
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert asyncio.run(answers()) == (401, 401)
    assert asyncio.run(answers(key="secret")) == (200, 404)


def test_a_key_of_any_bytes_is_wrong_and_no_failure() -> None:
    async def run() -> None:
        async with proxied(FakeServer(), api_keys=["ours"]) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.client.port)
            writer.write(b"GET /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization: \xff\xfe\r\n\r\n")
            assert (await reader.readline()).split()[1] == b"401"
            writer.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'"x"', b"\xff", b'{"deadline_s": "soon"}', b'{"deadline_s": -1}']
)
def test_a_drain_that_cannot_be_read_is_a_mistake_of_its_sender(body: bytes) -> None:
    async def run() -> None:
        server = FakeServer()
        async with proxied(server) as proxy:
            path = f"/llumsched/instances/{server.server_id}/drain"
            answer = await proxy.client.post(path, data=body)
            assert answer.status == 400
            assert (await answer.json())["error"]["message"]
            assert not proxy.fleet.servers[server.server_id].is_draining

    asyncio.run(run())


def refusals(proxy: Proxied) -> dict[str, str]:
    """Sentence of each command of an operator that a proxy cannot carry out."""
    client = AdminClient(f"http://127.0.0.1:{proxy.client.port}")
    (server_id,) = proxy.fleet.servers
    calls: dict[str, Callable[[], object]] = {
        "restart": lambda: client.drain(server_id, replace=True),
        "scale": lambda: client.scale(2),
        "migrate": lambda: client.migrate("r"),
        "trace": lambda: client.trace("r"),
        "top": lambda: next(client.live()),
    }
    said = {}
    for name, call in calls.items():
        with pytest.raises(CommandError) as error:
            call()
        said[name] = str(error.value)
    return said


def test_a_command_that_a_proxy_cannot_carry_out_says_why_and_changes_nothing() -> None:
    """`restart` would have drained every server in turn, and waited for those in their place."""

    async def run() -> None:
        server = FakeServer()
        async with proxied(server) as proxy:
            said = await asyncio.to_thread(refusals, proxy)
            assert not proxy.fleet.servers[server.server_id].is_draining
        assert "starts no servers" in said["restart"]
        assert "starts no servers" in said["scale"]
        assert "cannot hand its requests over" in said["migrate"]
        assert "keeps no history" in said["trace"]
        assert "no live page" in said["top"]

    asyncio.run(run())


def test_what_there_is_not_is_said_by_its_path() -> None:
    async def run() -> None:
        async with proxied(FakeServer()) as proxy:
            for method, path, said in (
                ("GET", "/nowhere", "There is no path /nowhere at this proxy."),
                ("PUT", "/health", "/health does not take PUT."),
            ):
                answer = await proxy.client.request(method, path)
                assert (await answer.json())["error"]["message"] == said

    asyncio.run(run())


def test_a_policy_that_fails_is_said_with_its_line_counted_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken_proxy.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    caplog.set_level(logging.INFO, "llumsched")

    async def run() -> None:
        async with proxied(FakeServer(), config="policy: broken_proxy:Broken") as proxy:
            page = await (await proxy.client.get("/metrics")).text()
            assert 'llumsched_policy_failures_total{policy="Broken"} 0.0' in page
            for _ in range(3):
                assert (await proxy.ask()).status == 200
            page = await (await proxy.client.get("/metrics")).text()
            assert 'llumsched_policy_failures_total{policy="Broken"} 3.0' in page
            pool = await (await proxy.client.get("/llumsched/instances")).json()
            assert pool["policy_failures"] == {"Broken": 3}

    asyncio.run(run())
    (said,) = [text for text in caplog.messages if "Broken failed" in text]
    assert "broken_proxy.py" in said
    assert "line 3, in dispatch" in said


ODD_BODIES = [
    *(b"", b"[]", b'"x"', b"\xff", b"{", b"[" * 100_000, b'{"a": NaN}'),
    *(b'{"url": 5}', b'{"url": "http://["}', b'{"url": "http://a", "weight": []}'),
    *(b'{"lora_name": "\\ud800"}', b'{"lora_name": "a", "num_servers": "x"}'),
]
ODD_PATHS = ("/llumsched/backends", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")


@pytest.mark.parametrize("path", ODD_PATHS)
def test_an_odd_body_is_a_mistake_of_its_sender(path: str) -> None:
    async def run() -> None:
        async with proxied(FakeServer()) as proxy:
            for body in ODD_BODIES:
                headers = {"Content-Type": "text/x; charset=nonsense"}
                answer = await proxy.client.post(path, data=body, headers=headers)
                assert 400 <= answer.status < 500, body
                assert (await answer.json())["error"]["message"], body

    asyncio.run(run())
