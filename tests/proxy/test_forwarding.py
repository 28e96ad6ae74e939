"""Requests through the proxy: bytes, tries, failures, and what is left behind."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.proxy.servers import FakeServer, proxied, until, watch_often


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    watch_often(monkeypatch)


def test_an_answer_comes_byte_for_byte_and_says_whose_it_is() -> None:
    async def run() -> None:
        server = FakeServer()
        async with proxied(server) as proxy:
            answer = await proxy.ask(temperature=0.5, headers={"X-Trace": "7"})
            assert await answer.read() == server.whole()
            assert answer.headers["X-Own"] == "1"
            assert answer.headers["x-llumsched-instance"] == server.server_id
            assert answer.headers["x-llumsched-policy"] == "least_requests"
            assert server.bodies[0]["temperature"] == 0.5
            assert server.headers[0]["X-Trace"] == "7"

    asyncio.run(run())


def test_requests_go_where_fewest_are() -> None:
    async def run() -> None:
        servers = [FakeServer(allowed=asyncio.Semaphore(0)) for _ in range(2)]
        async with proxied(*servers) as proxy:
            answers = [await proxy.ask() for _ in range(4)]
            assert [len(server.bodies) for server in servers] == [2, 2]
            for server in servers:
                assert server.allowed is not None
                for _ in range(10):
                    server.allowed.release()
            for answer in answers:
                assert (await answer.read()).endswith(b"[DONE]\n\n")
            await until(lambda: not any(s.sent for s in proxy.fleet.servers.values()))

    asyncio.run(run())


def test_a_server_that_is_gone_fails_no_request_that_has_not_begun() -> None:
    async def run() -> None:
        gone, other = FakeServer(), FakeServer()
        async with proxied(gone, other, config="policy: round_robin") as proxy:
            await gone.die()
            for _ in range(6):
                answer = await proxy.ask()
                assert answer.status == 200
                assert await answer.read() == other.whole()
            await until(lambda: not proxy.fleet.servers[gone.server_id].is_there)

    asyncio.run(run())


@pytest.mark.parametrize("status", [502, 503, 504])
def test_an_overloaded_server_s_requests_are_tried_again(status: int) -> None:
    async def run() -> None:
        sick, other = FakeServer(status=status), FakeServer()
        async with proxied(sick, other, config="policy: round_robin") as proxy:
            for _ in range(6):
                answer = await proxy.ask()
                assert answer.status == 200, await answer.text()
                assert await answer.read() == other.whole()

    asyncio.run(run())


def test_the_last_servers_own_error_is_passed_on() -> None:
    async def run() -> None:
        async with proxied(FakeServer(status=503)) as proxy:
            answer = await proxy.ask()
            assert answer.status == 503
            assert (await answer.json())["error"]["message"] == "no"

    asyncio.run(run())


def test_a_client_s_mistake_is_answered_by_the_server_and_not_tried_again() -> None:
    async def run() -> None:
        server = FakeServer(status=400)
        async with proxied(server) as proxy:
            assert (await proxy.ask()).status == 400
            assert len(server.bodies) == 1
            assert proxy.fleet.servers[server.server_id].is_there

    asyncio.run(run())


def test_a_stream_whose_server_dies_ends_with_an_error_event() -> None:
    async def run() -> None:
        dying, other = FakeServer(allowed=asyncio.Semaphore(0)), FakeServer()
        async with proxied(dying, other, config="policy: round_robin") as proxy:
            answers = [await proxy.ask() for _ in range(2)]
            (broken,) = (a for a in answers if a.headers["x-llumsched-instance"] == dying.server_id)
            assert await broken.content.readuntil(b"\n\n") == dying.event(0)
            await dying.die()
            rest = (await broken.read()).decode().strip()
            error = json.loads(rest.removeprefix("data: "))["error"]
            assert dying.server_id in error["message"]
            assert error["code"] == 502
            (whole,) = (a for a in answers if a is not broken)
            assert await whole.read() == other.whole()
            await until(lambda: not any(s.sent for s in proxy.fleet.servers.values()))

    asyncio.run(run())


def test_a_client_that_leaves_ends_the_work_for_it() -> None:
    async def run() -> None:
        server = FakeServer(allowed=asyncio.Semaphore(0))
        async with proxied(server) as proxy:
            answer = await proxy.ask()
            await answer.content.readuntil(b"\n\n")
            answer.close()
            await until(lambda: not proxy.fleet.servers[server.server_id].sent)
            assert proxy.fleet.servers[server.server_id].is_there
            assert server.allowed is not None
            for _ in range(10):
                server.allowed.release()
            await until(lambda: server.num_left == 1)

    asyncio.run(run())


def test_a_client_that_leaves_while_it_waits_is_forgotten() -> None:
    async def run() -> None:
        config = "{policy: least_requests, scheduler: {max_waiting_per_instance: 1}}"
        server = FakeServer(models=["model"])
        async with proxied(server, config=config) as proxy:
            await server.die()
            await until(lambda: not proxy.fleet.servers[server.server_id].is_there)
            asking = asyncio.create_task(proxy.ask())
            pool = proxy.fleet.pools["model"]
            await until(lambda: sum(pool.num_held_by_class.values()) == 1)
            asking.cancel()
            await until(lambda: not pool.num_held_by_class)

    asyncio.run(run())


def test_a_request_that_no_server_takes_in_time_is_told_when_to_come_back() -> None:
    async def run() -> None:
        config = "{policy: least_requests, scheduler: {queue_timeout_s: 0.1}}"
        server = FakeServer()
        async with proxied(server, config=config) as proxy:
            await server.die()
            await until(lambda: not proxy.fleet.servers[server.server_id].is_there)
            answer = await proxy.ask()
            assert answer.status == 503
            assert int(answer.headers["Retry-After"]) >= 1

    asyncio.run(run())


QUOTA = """
policy: round_robin
parts: {admission: {name: quota, requests_per_minute: 2}}
"""


def test_answers_tell_what_is_left_of_a_quota() -> None:
    async def run() -> None:
        server = FakeServer()
        async with proxied(server, config=QUOTA) as proxy:
            answers = [await proxy.ask(headers={"X-Client-Id": "c"}) for _ in range(3)]
            assert [answer.status for answer in answers] == [200, 200, 429]
            told = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
            assert told == ["1", "0", "0"]
            assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {"2"}
            assert "Retry-After" in answers[2].headers
            assert "x-ratelimit-limit-tokens" not in answers[0].headers
            other = await proxy.ask(headers={"X-Client-Id": "d"})
            assert other.headers["x-ratelimit-remaining-requests"] == "1"

    asyncio.run(run())


def test_a_request_that_is_tried_again_is_charged_once() -> None:
    async def run() -> None:
        sick, other = FakeServer(status=503), FakeServer()
        async with proxied(sick, other, config=QUOTA) as proxy:
            for number in range(4):
                answer = await proxy.ask(headers={"X-Client-Id": str(number)})
                assert answer.status == 200
                assert answer.headers["x-ratelimit-remaining-requests"] == "1"
            assert sick.bodies

    asyncio.run(run())


@pytest.mark.parametrize(
    "named",
    [
        {"headers": {"X-Session-Id": "one"}},
        {"headers": {"session_id": "one"}},
        {"prompt_cache_key": "one"},
        {"session_id": "one"},
        {"conversation": "one"},
        {"conversation": {"id": "one"}},
        {"metadata": {"session_id": "one"}},
        {"user": "one"},
    ],
)
def test_turns_of_a_session_go_to_the_same_server(named: dict[str, Any]) -> None:
    async def run() -> None:
        servers = [FakeServer() for _ in range(3)]
        async with proxied(*servers, config="policy: round_robin") as proxy:
            homes = set()
            for number in range(4):
                answer = await proxy.ask(f"turn {number}", **named)
                await answer.read()
                homes.add(answer.headers["x-llumsched-instance"])
                await (await proxy.ask("another's")).read()
            assert len(homes) == 1
            assert sum(bool(server.bodies) for server in servers) == 3

    asyncio.run(run())


def test_a_conversation_that_a_server_keeps_goes_on_there_whatever_the_policy() -> None:
    async def run() -> None:
        servers = [FakeServer() for _ in range(2)]
        async with proxied(*servers, config="policy: prefix_aware") as proxy:
            text = "The same beginning of a prompt. " * 20
            seen = set()
            for number in range(4):
                body = {
                    "model": "model",
                    "input": f"{number} {text}",
                    "prompt_cache_key": "k",
                    "previous_response_id": f"resp_{number}",
                }
                answer = await proxy.client.post("/v1/responses", json=body)
                await answer.read()
                seen.add(answer.headers["x-llumsched-instance"])
            assert len(seen) == 1

    asyncio.run(run())


def test_with_several_keys_a_client_is_its_key_and_a_name_gets_it_no_more() -> None:
    async def run() -> None:
        async with proxied(FakeServer(), config=QUOTA, api_keys=["one", "two"]) as proxy:
            statuses = []
            for number in range(3):
                named = {"Authorization": "Bearer one", "X-Client-Id": str(number)}
                statuses.append((await proxy.ask(headers=named)).status)
            assert statuses == [200, 200, 429]
            other = await proxy.ask(headers={"Authorization": "Bearer two"})
            assert other.status == 200

    asyncio.run(run())


@pytest.mark.parametrize("header", ["X-Request-Priority", "X-SLO-TTFT-Ms"])
def test_a_hint_that_cannot_be_read_is_a_client_s_mistake(header: str) -> None:
    async def run() -> None:
        async with proxied(FakeServer()) as proxy:
            answer = await proxy.ask(headers={header: "soon"})
            assert answer.status == 400
            assert header in (await answer.json())["error"]["message"]

    asyncio.run(run())


def test_prompts_go_where_their_beginning_was_computed() -> None:
    async def run() -> None:
        servers = [FakeServer() for _ in range(3)]
        async with proxied(*servers, config="policy: prefix_aware") as proxy:
            beginning = "Once upon a time there was a scheduler. " * 40
            first = await proxy.ask(beginning)
            await first.read()
            home = first.headers["x-llumsched-instance"]
            for number in range(4):
                answer = await proxy.ask(f"{beginning} And then, for the {number}th time,")
                await answer.read()
                assert answer.headers["x-llumsched-instance"] == home

    asyncio.run(run())


def test_each_model_of_a_server_has_its_own_prefixes() -> None:
    """A base model and its adapter share a server's cache, and no block of it."""

    async def run() -> None:
        servers = [FakeServer(models=["model", "adapter"]) for _ in range(2)]
        async with proxied(*servers, config="policy: prefix_aware") as proxy:
            text = "Once upon a time there was a scheduler. " * 40
            for model in ("model", "adapter"):
                await (await proxy.ask(text, model=model)).read()
            for model in ("model", "adapter"):
                again = await proxy.ask(text, model=model)
                await again.read()
                assert "blocks cached" in again.headers["x-llumsched-reason"]
            for server in proxy.fleet.servers.values():
                server.prefixes.max_blocks = 1
            for number in range(4):
                await (await proxy.ask(f"{number} {text}")).read()
            adapter = await proxy.ask(text, model="adapter")
            assert "nothing cached" in adapter.headers["x-llumsched-reason"]

    asyncio.run(run())


def test_each_model_has_its_servers() -> None:
    async def run() -> None:
        one, two = FakeServer(models=["a"]), FakeServer(models=["b", "adapter"])
        async with proxied(one, two) as proxy:
            listed = await (await proxy.client.get("/v1/models")).json()
            assert [entry["id"] for entry in listed["data"]] == ["a", "adapter", "b"]
            for model, server in (("a", one), ("b", two), ("adapter", two)):
                answer = await proxy.ask(model=model)
                assert await answer.read() == server.whole()
            unknown = await proxy.ask(model="c")
            assert unknown.status == 404
            assert "a, adapter, b" in (await unknown.json())["error"]["message"]

    asyncio.run(run())


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": 3}', b"\xff"])
def test_what_is_no_request_is_a_client_s_mistake(body: bytes) -> None:
    async def run() -> None:
        async with proxied(FakeServer()) as proxy:
            answer = await proxy.client.post("/v1/chat/completions", data=body)
            assert answer.status == 400
            assert (await answer.json())["error"]["type"] == "BadRequestError"

    asyncio.run(run())


def test_a_backend_s_own_key_goes_with_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        server = FakeServer()
        async with proxied(server, options=",api_key_env=ITS_KEY", api_keys=["ours"]) as proxy:
            refused = await proxy.ask()
            assert refused.status == 401
            answer = await proxy.ask(headers={"Authorization": "Bearer ours"})
            assert answer.status == 200
            assert server.headers[0]["Authorization"] == "Bearer theirs"

    monkeypatch.setenv("ITS_KEY", "theirs")
    asyncio.run(run())
