"""Streams that go on at another server from the text that their client has."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from llumsched.proxy.continuation import CHAT, COMPLETIONS, Delivery, delivery_of
from tests.proxy.servers import FakeServer, Proxied, proxied, until, watch_often

VLLM_PAGE = "vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n"
ANSWER = "".join(f"{number}," for number in range(6))


@dataclass(slots=True)
class Counting(FakeServer):
    """A server whose model counts to six from wherever a text stops, a number a token."""

    metrics: str = VLLM_PAGE
    more: dict[str, Any] = field(default_factory=dict)
    """Fields that each choice has besides."""
    num_answers: int = 0

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.status != 200:
            return web.json_response({"error": {"message": "no"}}, status=self.status)
        self.num_answers += 1
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        for event in self.events(body):
            await answer.write(event)
            if self.allowed is not None:
                await self.allowed.acquire()
        await answer.write(b"data: [DONE]\n\n")
        return answer

    def events(self, body: dict[str, Any]) -> list[bytes]:
        is_chat = "messages" in body
        said = body["messages"][-1]["content"] if is_chat else body["prompt"]
        begun = said.count(",")
        end = min(6, begun + body.get("max_tokens", 6))
        told: list[dict[str, Any]] = []
        if is_chat:
            told.append({"delta": {"role": "assistant", "content": ""}, "finish_reason": None})
        for number in range(begun, end):
            text = f"{number},"
            is_last = number + 1 == end
            piece = {"delta": {"content": text}} if is_chat else {"text": text}
            why = ("stop" if end == 6 else "length") if is_last else None
            told.append({**piece, "finish_reason": why, **self.more})
        events = [self._event([{"index": 0, **choice}], None) for choice in told]
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = {
                "prompt_tokens": 10 + begun,
                "completion_tokens": end - begun,
                "total_tokens": 10 + end,
            }
            events.append(self._event([], usage))
        return events

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        content = {
            "id": f"{self.server_id}-{self.num_answers}",
            "created": self.num_answers,
            "model": "model",
            "choices": choices,
            **({"usage": usage} if usage else {}),
        }
        return f"data: {json.dumps(content)}\n\n".encode()


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    watch_often(monkeypatch)


def told(stream: bytes) -> list[dict[str, Any]]:
    """Every event of a stream that is an object."""
    lines = [line.removeprefix("data: ") for line in stream.decode().split("\n")]
    return [json.loads(line) for line in lines if line.startswith("{")]


def text_of(events: list[dict[str, Any]]) -> str:
    choices = [choice for event in events for choice in event.get("choices", ())]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


async def broken_after(
    proxy: Proxied, dying: Counting, num_events: int, path: str, **fields: Any
) -> bytes:
    """The whole stream of a client whose server dies when it has sent so many events."""
    body = {"model": "model", "stream": True, **fields}
    if path == CHAT:
        body.setdefault("messages", [{"role": "user", "content": "count"}])
    else:
        body.setdefault("prompt", "count: ")
    # The turn of the dying one comes within two.
    for _ in range(2):
        answer = await proxy.client.post(path, json=body)
        if answer.headers["x-llumsched-instance"] == dying.server_id:
            break
        await answer.read()
    assert dying.allowed is not None
    begun = b""
    for number in range(num_events):
        if number:
            dying.allowed.release()
        begun += await answer.content.readuntil(b"\n\n")
    await dying.die()
    return begun + await answer.read()


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("num_events", [1, 2, 4])
def test_a_broken_stream_goes_on_with_the_same_answer(path: str, num_events: int) -> None:
    async def run() -> None:
        dying, other = Counting(allowed=asyncio.Semaphore(0)), Counting()
        config = "policy: round_robin"
        async with proxied(dying, other, config=config, continues_streams=True) as proxy:
            stream = await broken_after(
                proxy,
                dying,
                num_events,
                path,
                max_tokens=50,
                stream_options={"include_usage": True},
            )
            events = told(stream)
            assert text_of(events) == ANSWER
            assert stream.endswith(b"data: [DONE]\n\n")
            assert f": x-llumsched-instance: {other.server_id}\n\n".encode() in stream
            assert {(e["id"], e["created"]) for e in events} == {(f"{dying.server_id}-1", 1)}
            roles = [
                e for e in events if e["choices"] and "role" in e["choices"][0].get("delta", {})
            ]
            assert len(roles) == (path == CHAT)
            assert [e["choices"][0]["finish_reason"] for e in events if e["choices"]][-1] == "stop"
            assert events[-1]["usage"] == {
                "prompt_tokens": 10,
                "completion_tokens": 6,
                "total_tokens": 16,
            }
            asked = other.bodies[-1]
            num_tokens = num_events - (path == CHAT)
            delivered = ANSWER[: 2 * num_tokens]
            assert asked["max_tokens"] == 50 - num_tokens
            if path == COMPLETIONS:
                assert asked["prompt"] == "count: " + delivered
            elif delivered:
                assert asked["messages"][-1] == {"role": "assistant", "content": delivered}
                assert asked["continue_final_message"] is True
                assert asked["add_generation_prompt"] is False
            else:
                assert "continue_final_message" not in asked
            page = await (await proxy.client.get("/metrics")).text()
            name = "llumsched_proxy_continuations_total"
            assert f'{name}{{server="{other.server_id}"}} 1.0' in page
            await until(lambda: not any(s.sent for s in proxy.fleet.servers.values()))

    asyncio.run(run())


def test_without_the_flag_a_broken_stream_ends_with_an_error() -> None:
    async def run() -> None:
        dying, other = Counting(allowed=asyncio.Semaphore(0)), Counting()
        async with proxied(dying, other, config="policy: round_robin") as proxy:
            events = told(await broken_after(proxy, dying, 2, COMPLETIONS))
            assert events[-1]["error"]["code"] == 502

    asyncio.run(run())


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"logprobs": 0},
        {"echo": True},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function"}]},
        {"structured_outputs": {"choice": ["a"]}},
        {"prompt": [1, 2, 3]},
        {"prompt": ["a", "b"]},
    ],
)
def test_what_text_does_not_carry_is_not_continued(fields: dict[str, Any]) -> None:
    content = {"model": "m", "stream": True, "prompt": "a", **fields}
    assert delivery_of(COMPLETIONS, content) is None
    chat = {"messages": [{"role": "user", "content": "a"}], **content}
    if "prompt" not in fields:
        assert delivery_of(CHAT, chat) is None
    assert delivery_of("/v1/responses", {"stream": True, "input": "a"}) is None


@pytest.mark.parametrize(
    "more",
    [
        {"delta": {"content": "", "reasoning": "well"}},
        {"delta": {"tool_calls": [{"index": 0}]}},
        {"logprobs": {"content": []}},
        {"index": 1},
    ],
)
def test_an_answer_with_more_than_text_ends_with_an_error(more: dict[str, Any]) -> None:
    async def run() -> None:
        dying = Counting(allowed=asyncio.Semaphore(0), more=more)
        other = Counting()
        config = "policy: round_robin"
        async with proxied(dying, other, config=config, continues_streams=True) as proxy:
            stream = await broken_after(proxy, dying, 3, CHAT)
            assert "failed in the middle" in told(stream)[-1]["error"]["message"]

    asyncio.run(run())


def test_a_chat_is_continued_by_engines_that_can_alone() -> None:
    async def run() -> None:
        dying, other = Counting(allowed=asyncio.Semaphore(0)), Counting(metrics="")
        config = "policy: round_robin"
        async with proxied(dying, other, config=config, continues_streams=True) as proxy:
            events = told(await broken_after(proxy, dying, 3, CHAT))
            assert events[-1]["error"]["code"] == 502
            await proxy.until(lambda: not any(s.sent for s in proxy.fleet.servers.values()))

    asyncio.run(run())


def test_a_stream_that_had_its_end_is_whole() -> None:
    async def run() -> None:
        dying, other = Counting(allowed=asyncio.Semaphore(0)), Counting()
        config = "policy: round_robin"
        async with proxied(dying, other, config=config, continues_streams=True) as proxy:
            num_before = len(other.bodies)
            stream = await broken_after(proxy, dying, 2, COMPLETIONS, max_tokens=2)
            assert stream.endswith(b"data: [DONE]\n\n")
            assert text_of(told(stream)) == "0,1,"
            assert len(other.bodies) <= num_before + 1

    asyncio.run(run())


def test_with_nobody_else_there_it_ends_with_an_error() -> None:
    async def run() -> None:
        config = "{policy: round_robin, scheduler: {queue_timeout_s: 0.1}}"
        dying, sick = Counting(allowed=asyncio.Semaphore(0)), Counting(status=500)
        async with proxied(dying, sick, config=config, continues_streams=True) as proxy:
            stream = await broken_after(proxy, dying, 2, COMPLETIONS)
            assert told(stream)[-1]["error"]["code"] == 502

    asyncio.run(run())


def test_it_may_break_twice() -> None:
    async def run() -> None:
        first, second, third = (Counting(allowed=asyncio.Semaphore(0)) for _ in range(3))
        dying = [first, second, third]
        config = "policy: round_robin"
        async with proxied(*dying, config=config, continues_streams=True) as proxy:
            answer = await proxy.ask("count: ")
            stream = b""
            for number in range(2):
                while text_of(told(stream)).count(",") <= number:
                    stream += await answer.content.readuntil(b"\n\n")
                (serving,) = (s for s in dying if proxy.fleet.servers[s.server_id].sent)
                await serving.die()
                dying.remove(serving)
            (last,) = dying
            assert last.allowed is not None
            for _ in range(10):
                last.allowed.release()
            stream += await answer.read()
            assert text_of(told(stream)) == ANSWER

    asyncio.run(run())


def test_whole_events_alone_are_passed_on_however_they_are_cut() -> None:
    server = Counting(_port=1)
    stream = b"".join(server.events({"prompt": ""})) + b": ping\n\ndata: [DONE]\n\n"
    for size in (1, 2, 7, len(stream)):
        delivery = delivery_of(COMPLETIONS, {"stream": True, "prompt": ""})
        assert isinstance(delivery, Delivery)
        passed = [delivery.feed(stream[i : i + size]) for i in range(0, len(stream), size)]
        assert b"".join(passed) == stream
        assert all(not part or part.endswith(b"\n\n") for part in passed)
        assert (delivery.num_tokens, delivery.is_over) == (6, True)


def test_tokens_are_those_that_the_server_counts_if_it_does() -> None:
    delivery = delivery_of(COMPLETIONS, {"stream": True, "prompt": "a", "max_tokens": 9})
    assert delivery is not None
    choice = {"index": 0, "text": "bcd", "finish_reason": None}
    delivery.feed(
        b"data: " + json.dumps({"choices": [choice], "usage": {"completion_tokens": 4}}).encode()
    )
    delivery.feed(b"\r\n\r\n")
    assert json.loads(delivery.body()) == {"stream": True, "prompt": "abcd", "max_tokens": 5}
    assert delivery.refusal is None
    delivery.another_server()
    delivery.feed(
        b"data: " + json.dumps({"choices": [choice], "usage": {"completion_tokens": 5}}).encode()
    )
    delivery.feed(b"\n\n")
    assert delivery.num_tokens == 9
    assert delivery.refusal is not None


def test_a_message_that_the_client_began_is_continued() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    content = {"stream": True, "messages": messages, "continue_final_message": True}
    delivery = delivery_of(CHAT, content)
    assert delivery is not None
    choice = {"index": 0, "delta": {"content": "c"}, "finish_reason": None}
    delivery.feed(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
    assert json.loads(delivery.body())["messages"][-1] == {"role": "assistant", "content": "bc"}
    assert messages[-1]["content"] == "b"
