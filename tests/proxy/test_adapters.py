"""LoRA adapters of plain servers: loaded while they run, found, and unloaded for others."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from llumsched.proxy.backends import BackendError, parse_backend
from tests.proxy.servers import FakeServer, Proxied, proxied, until, watch_often


@dataclass(slots=True)
class AdapterServer(FakeServer):
    """A server as vLLM's with adapters that may be loaded."""

    adapters: dict[str, str] = field(default_factory=dict)
    orders: list[str] = field(default_factory=list)
    refuses: int = 0
    """The status that orders are answered with, where they are refused."""

    async def _models(self, request: web.Request) -> web.Response:
        entries: list[dict[str, Any]] = [{"id": name} for name in self.models]
        entries += [{"id": name, "parent": self.models[0]} for name in self.adapters]
        return web.json_response({"data": entries})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if not request.path.endswith("_lora_adapter"):
            # Without arguments it is of another class: slots make a new one.
            return await FakeServer._answer(self, request)
        body = await request.json()
        if self.refuses:
            return web.json_response({"error": {"message": "no room"}}, status=self.refuses)
        what = request.path.removeprefix("/v1/").removesuffix("_lora_adapter")
        self.orders.append(f"{what} {body['lora_name']}")
        if what == "load":
            self.adapters[body["lora_name"]] = body["lora_path"]
        else:
            del self.adapters[body["lora_name"]]
        return web.Response(text="Success")


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    watch_often(monkeypatch)


async def load(proxy: Proxied, name: str, **fields: Any) -> int:
    body = {"lora_name": name, "lora_path": f"/adapters/{name}", **fields}
    return (await proxy.client.post("/v1/load_lora_adapter", json=body)).status


async def unload(proxy: Proxied, name: str) -> int:
    body = {"lora_name": name}
    return (await proxy.client.post("/v1/unload_lora_adapter", json=body)).status


async def models(proxy: Proxied) -> list[str]:
    listed = await (await proxy.client.get("/v1/models")).json()
    return [entry["id"] for entry in listed["data"]]


def test_an_adapter_is_loaded_at_all_servers_of_its_model_or_at_so_many() -> None:
    async def run() -> None:
        servers = [AdapterServer() for _ in range(3)]
        other = AdapterServer(models=["other"])
        async with proxied(*servers, other) as proxy:
            assert await load(proxy, "a", base_model="model") == 200
            assert [server.adapters for server in servers] == [{"a": "/adapters/a"}] * 3
            assert not other.adapters
            assert await load(proxy, "b", base_model="other") == 200
            assert await load(proxy, "c", base_model="model", num_servers=1) == 200
            (home,) = (server for server in servers if "c" in server.adapters)
            for _ in range(4):
                answer = await proxy.ask(model="c")
                assert await answer.read() == home.whole()
            assert await load(proxy, "c", base_model="model", num_servers=1) == 200
            assert sum("c" in server.adapters for server in servers) == 1
            assert await models(proxy) == ["a", "b", "c", "model", "other"]
            assert await unload(proxy, "a") == 200
            assert not any("a" in server.adapters for server in servers)
            assert (await proxy.ask(model="a")).status == 404
            assert await unload(proxy, "a") == 404

    asyncio.run(run())


def test_the_adapter_unused_longest_makes_room_and_comes_back_when_it_is_asked_for() -> None:
    async def run() -> None:
        server = AdapterServer()
        async with proxied(server, options=",max_adapters=2") as proxy:
            assert await load(proxy, "a") == 200
            assert await load(proxy, "b") == 200
            for name in ("b", "a"):
                await (await proxy.ask(model=name)).read()
            assert await load(proxy, "c") == 200
            assert set(server.adapters) == {"a", "c"}
            assert await models(proxy) == ["a", "b", "c", "model"]
            answers = await asyncio.gather(*(proxy.ask(model="b") for _ in range(3)))
            assert [answer.status for answer in answers] == [200] * 3
            assert server.orders[-2:] == ["unload c", "load b"]
            assert server.orders.count("load b") == 2

    asyncio.run(run())


def test_an_adapter_with_requests_is_not_unloaded_for_another() -> None:
    async def run() -> None:
        server = AdapterServer(allowed=asyncio.Semaphore(0))
        async with proxied(server, options=",max_adapters=1") as proxy:
            assert await load(proxy, "a") == 200
            answer = await proxy.ask(model="a")
            assert await load(proxy, "b") == 503
            assert set(server.adapters) == {"a"}
            assert server.allowed is not None
            for _ in range(4):
                server.allowed.release()
            assert await answer.read() == server.whole()
            assert await load(proxy, "b") == 200
            assert set(server.adapters) == {"b"}

    asyncio.run(run())


def test_a_server_that_was_started_anew_gets_its_adapter_again() -> None:
    async def run() -> None:
        server = AdapterServer()
        async with proxied(server) as proxy:
            assert await load(proxy, "a") == 200
            seen = proxy.fleet.servers[server.server_id]
            server.health = 500
            await until(lambda: not seen.is_there)
            server.adapters.clear()
            server.health = 200
            await until(lambda: seen.is_there)
            assert (await proxy.ask(model="a")).status == 200
            assert server.orders == ["load a", "load a"]

    asyncio.run(run())


def test_what_a_server_refuses_is_told_and_not_remembered() -> None:
    async def run() -> None:
        server = AdapterServer(refuses=400)
        async with proxied(server) as proxy:
            body = {"lora_name": "a", "lora_path": "/nowhere"}
            answer = await proxy.client.post("/v1/load_lora_adapter", json=body)
            assert answer.status == 400
            message = (await answer.json())["error"]["message"]
            assert server.server_id in message
            assert "no room" in message
            assert await models(proxy) == ["model"]
            server.refuses = 500
            assert await load(proxy, "a") == 502

    asyncio.run(run())


@pytest.mark.parametrize(
    "body", [[], {}, {"lora_name": 3}, {"lora_name": "a", "num_servers": 0}, {"lora_name": "a"}]
)
def test_a_mistake_is_answered_with_400(body: Any) -> None:
    async def run() -> None:
        servers = AdapterServer(), AdapterServer(models=["other"])
        async with proxied(*servers) as proxy:
            answer = await proxy.client.post("/v1/load_lora_adapter", json=body)
            assert answer.status == 400
            assert not any(server.orders for server in servers)

    asyncio.run(run())


def test_a_limit_is_a_number() -> None:
    with pytest.raises(BackendError, match="max_adapters"):
        parse_backend("http://a,max_adapters=many")
