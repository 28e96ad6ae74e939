"""Hints of a client on its request in headers, and how it reaches the scheduler."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from hypothesis import given
from hypothesis import strategies as st

from llumsched.core.types import PriorityClass
from llumsched.frontend.request.hints import (
    SchedulingHintsMiddleware,
    current,
    let_keys_name_clients,
)
from llumsched.hints import NO_HINTS, SESSION_NAMES, SchedulingHints, parse


def headers(**values: str) -> list[tuple[bytes, bytes]]:
    return [(name.replace("_", "-").encode(), value.encode()) for name, value in values.items()]


def test_without_our_headers_there_are_no_hints() -> None:
    assert parse(headers(host="x", accept="*/*")) is NO_HINTS


def test_every_header() -> None:
    found = parse(
        headers(
            x_request_priority="HIGH", x_slo_ttft_ms="250", x_slo_tpot_ms="40.5", x_client_id="a"
        )
    )
    assert found == SchedulingHints(
        priority=PriorityClass.HIGH, ttft_slo_s=0.25, tpot_slo_s=0.0405, client_id="a"
    )


def test_a_client_is_told_apart_by_its_key_which_is_not_kept() -> None:
    key = "Bearer sk-secret"
    one, again, other = (
        parse(headers(authorization=text)).client_id for text in (key, key, key + "2")
    )
    assert one is not None
    assert one == again != other
    assert "secret" not in one
    assert parse(headers(authorization=key, x_client_id="tenant")).client_id == "tenant"


def test_one_key_is_not_many_clients() -> None:
    """Or else whoever has one takes what shares of a full queue it likes."""

    def client(authorization: str, **others: str) -> str | None:
        found = headers(authorization=authorization, **others)
        return parse(found, key_names_client=True).client_id

    one = client("Bearer sk-1")
    assert client("bEARER sk-1") == client("Bearer sk-1", x_client_id="another") == one
    assert client("Bearer sk-2") != one
    assert parse(headers(x_client_id="a"), key_names_client=True).client_id == "a", "it has no key"


@pytest.mark.parametrize("name", [name.decode() for name in SESSION_NAMES])
def test_a_session_is_named_as_agents_do_it(name: str) -> None:
    assert parse([(name.encode(), b"abc")]).session_id == "abc"
    both = [(name.encode(), b"theirs"), (b"x-session-id", b"ours")]
    assert parse(both).session_id == "ours"
    assert parse([(name.encode(), b"x" * 1000)]).session_id == "x" * 256
    assert parse([(name.encode(), b" ")]).session_id is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x_request_priority", "urgent", "X-Request-Priority: .*'urgent'.*low, normal, high"),
        ("x_slo_ttft_ms", "soon", "X-SLO-TTFT-Ms: 'soon' is not a positive number"),
        ("x_slo_tpot_ms", "-1", "X-SLO-TPOT-Ms: '-1' is not a positive number"),
        ("x_slo_tpot_ms", "inf", "X-SLO-TPOT-Ms: 'inf'"),
        ("x_client_id", "x" * 129, "X-Client-Id: longer than 128"),
    ],
)
def test_what_cannot_be_read_is_said(name: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(headers(**{name: value}))


@given(st.dictionaries(st.sampled_from(["x-slo-ttft-ms", "x-client-id"]), st.binary()))
def test_any_bytes_are_read_or_refused(found: dict[str, bytes]) -> None:
    try:
        hints = parse([(name.encode(), value) for name, value in found.items()])
    except ValueError:
        return
    assert hints.ttft_slo_s is None or hints.ttft_slo_s > 0


def ask(path: str, *, several_keys: bool = False, **values: str) -> httpx.Response:
    app = FastAPI()
    if several_keys:
        let_keys_name_clients(app)

    @app.get("/plain")
    async def plain() -> Any:
        return {"client": current().client_id}

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def parts() -> Any:
            yield current().client_id or ""
            await asyncio.sleep(0)
            # As AsyncLLM does, in a task of its own.
            yield await asyncio.create_task(later())

        async def later() -> str:
            return current().client_id or ""

        return StreamingResponse(parts())

    app.add_middleware(SchedulingHintsMiddleware)

    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            asked = {name.replace("_", "-"): value for name, value in values.items()}
            return await client.get(path, headers=asked)

    response = asyncio.run(get())
    assert current() is NO_HINTS
    return response


def test_hints_are_seen_by_what_serves_the_request() -> None:
    assert ask("/plain", x_client_id="a").json() == {"client": "a"}
    assert ask("/stream", x_client_id="a").text == "aa"


def test_a_server_with_several_keys_goes_by_them() -> None:
    found = ask("/plain", several_keys=True, x_client_id="a", authorization="Bearer k").json()
    assert found == ask("/plain", authorization="Bearer k").json()


def test_a_bad_header_is_a_clear_400() -> None:
    response = ask("/plain", x_request_priority="urgent")
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "BadRequestError"
    assert "there are: low, normal, high" in error["message"]
