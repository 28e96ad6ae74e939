"""The live page: frames, quantiles of what was counted lately, and the page in a browser."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, Histogram

from llumsched.frontend.http.live import TTFT, LiveFeed, RecentQuantiles
from llumsched.frontend.routing.scheduler_client import SchedulerUnavailable
from llumsched.frontend.routing.status import RequestStatus
from llumsched.wire.control import ClusterDescription
from tests.frontend.live_incident import KILLED_S, Incident, app_of

TIMEOUT_S = 20.0


async def first_frames(feed: LiveFeed, number: int) -> list[dict[str, Any]]:
    frames = []
    async with asyncio.timeout(TIMEOUT_S):
        async for event in feed.frames():
            frames.append(json.loads(event.removeprefix(b"data: ")))
            if len(frames) == number:
                break
    return frames


def feed_of(incident: Incident, **changes: Any) -> LiveFeed:
    values: dict[str, Any] = {
        "describe": incident.describe,
        "requests": incident.requests,
        "places": incident.places,
        "block_size": lambda: 16,
        "registry": incident.registry,
        "interval_s": 0.001,
    }
    return LiveFeed(**(values | changes))


def test_a_frame_has_every_instance_and_request() -> None:
    frames = asyncio.run(first_frames(feed_of(Incident(3, 10, from_s=6.0)), 2))
    assert [i["id"] for i in frames[1]["instances"]] == ["instance-0", "instance-1", "instance-2"]
    assert len(frames[1]["requests"]) == 10
    assert {r["instance"] for r in frames[1]["requests"]} <= {
        i["id"] for i in frames[1]["instances"]
    }
    assert frames[1]["at_s"] > frames[0]["at_s"]
    assert frames[1]["ttft_p50_s"] > 0


def test_what_was_known_is_shown_while_the_scheduler_is_silent() -> None:
    incident, is_silent = Incident(2, 4), False

    async def describe() -> ClusterDescription:
        nonlocal is_silent
        if is_silent:
            raise SchedulerUnavailable("the scheduler does not answer")
        is_silent = True
        return await incident.describe()

    frames = asyncio.run(first_frames(feed_of(incident, describe=describe), 2))
    assert not frames[0]["error"]
    assert "does not answer" in frames[1]["error"]
    assert len(frames[1]["instances"]) == 2


def test_a_frontend_that_is_silent_is_said() -> None:
    async def requests() -> Sequence[RequestStatus]:
        raise TimeoutError

    (frame,) = asyncio.run(first_frames(feed_of(Incident(2, 4), requests=requests), 1))
    assert "a frontend does not answer" in frame["error"]
    assert frame["requests"] == []


def test_a_frame_says_where_an_instance_boots_and_what_died_there() -> None:
    (frame,) = asyncio.run(first_frames(feed_of(Incident(6, 4, from_s=KILLED_S)), 1))
    assert frame["places"] == [
        "instance-6: booting; 1 died in this place (its process was killed (SIGKILL))"
    ]
    assert [i["id"] for i in frame["instances"]].count("instance-6") == 0


def test_nobody_is_asked_while_nobody_looks() -> None:
    num_asked = 0
    incident = Incident(1, 1)

    async def describe() -> ClusterDescription:
        nonlocal num_asked
        num_asked += 1
        return await incident.describe()

    async def play() -> None:
        feed = feed_of(incident, describe=describe)
        assert num_asked == 0
        await first_frames(feed, 1)
        assert feed._task is not None
        async with asyncio.timeout(TIMEOUT_S):
            await feed._task

    asyncio.run(play())
    assert num_asked >= 1


def test_quantiles_are_those_of_the_window() -> None:
    registry = CollectorRegistry()
    histogram = Histogram(TTFT, "", ["engine"], buckets=(0.1, 1.0, 10.0), registry=registry)
    recent = RecentQuantiles(registry, TTFT, window_s=10.0)
    assert recent.quantile(0.5) is None
    for _ in range(100):
        histogram.labels("0").observe(5.0)
    recent.look(0.0)
    recent.look(20.0)
    assert recent.quantile(0.5) is None, "nothing was counted within the window"
    for _ in range(50):
        histogram.labels("0").observe(0.05)
        histogram.labels("1").observe(0.5)
    recent.look(25.0)
    assert recent.quantile(0.25) == pytest.approx(0.05)
    assert 0.1 <= (recent.quantile(0.75) or 0) <= 1.0
    histogram.labels("1").observe(50.0)
    recent.look(26.0)
    assert recent.quantile(1.0) == 10.0, "beyond the last bound the bound is said"


def test_the_page_is_one_file() -> None:
    app: FastAPI = app_of(Incident(2, 4))
    with TestClient(app) as client:
        page = client.get("/llumsched/")
    assert page.status_code == 200
    assert "<script src" not in page.text
    assert 'rel="stylesheet"' not in page.text
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert '"use strict"' in page.text


def in_a_browser() -> bool:
    if importlib.util.find_spec("playwright") is None:
        return False
    from scripts.screenshots import chromium_path

    return chromium_path() is not None


@pytest.mark.skipif(not in_a_browser(), reason="needs playwright, and Chromium on the path")
def test_in_a_browser_an_incident_is_seen_and_nothing_is_wider_than_the_window() -> None:
    from scripts.screenshots import PHONE, browser, opened, served

    async def play() -> None:
        incident = Incident(6, 128, is_stepped=True)
        async with asyncio.timeout(12 * TIMEOUT_S), served(incident) as url, browser() as chromium:
            errors: list[str] = []
            page = await opened(chromium, url, PHONE, stepped=incident)
            page.on("pageerror", lambda error: errors.append(str(error)))

            async def shown_at(until_s: float) -> list[str]:
                """The three answers at that time."""
                now_s = incident.seconds()
                while now_s < until_s:
                    now_s += 0.5
                    incident.step(now_s)
                    await page.wait_for_function(
                        "(s) => state.frame.at_s >= s", arg=now_s, polling=20
                    )
                return list(await page.locator(".answer").all_inner_texts())

            hot, waiting, _ = await shown_at(7.0)
            assert "instance-1 is hot" in hot
            assert "on instance-1: the next one needs" in waiting
            assert "3 held by the scheduler" in waiting
            assert await page.locator(".inst.hot").count() == 1
            _, _, moved = await shown_at(9.0)
            assert re.search(r"\d+ from instance-1 to \d others", moved)
            hot, waiting, _ = await shown_at(14.0)
            assert re.search("instance-2 is being drained: [0-9]+ to go", hot)
            assert "None waits" in waiting
            _, _, moved = await shown_at(19.0)
            assert "resumed" in moved
            assert "instance-6: booting; 1 died" in await page.inner_text("#places")
            events = await page.text_content("#events") or ""
            assert "instance-3 is gone" in events
            assert " moved: instance-1 → " in events
            await page.click(".inst .head button")
            assert await page.is_visible("#detail")
            assert await page.text_content("#detail h2 span") == "instance-0"
            await page.keyboard.press("Escape")
            assert not await page.is_visible("#detail")
            await page.evaluate("choose({ request: state.frame.requests.find((r) => r.moves).id })")
            await page.wait_for_function("state.told", polling=20)
            account = await page.inner_text("#detail ol")
            assert "placed instance-" in account
            assert "(freeness)" in account
            assert "moved instance-" in account
            width = await page.evaluate("document.documentElement.scrollWidth")
            assert width <= PHONE["width"]
            assert not errors

    asyncio.run(play())


@pytest.mark.slow
@pytest.mark.skipif(not in_a_browser(), reason="needs playwright, and Chromium on the path")
def test_in_a_browser_what_can_be_done_follows_what_has_happened() -> None:
    """A request that has moved may move back; what is gone has no buttons; one more is one more."""
    from scripts.screenshots import DESKTOP, browser, opened, served

    async def play() -> None:
        incident = Incident(4, 64, is_stepped=True)
        async with asyncio.timeout(6 * TIMEOUT_S), served(incident) as url, browser() as chromium:
            page = await opened(chromium, url, DESKTOP, stepped=incident)
            asked: list[int] = []

            async def scale(route: Any) -> None:
                asked.append(route.request.post_data_json["num_instances"])
                await route.fulfill(status=202, json={})

            await page.route("**/llumsched/scale", scale)

            async def next_frame(change: str) -> None:
                await page.evaluate(
                    "() => { const f = state.frame, id = state.chosen?.request;"
                    f" take({{ ...f, at_s: f.at_s + 0.1, {change} }}); }}"
                )

            async def destinations() -> list[str]:
                return list(await page.locator("#detail select option").all_inner_texts())

            await page.evaluate(
                "choose({ request: state.frame.requests.find((r) => r.instance === 'instance-0')"
                ".id })"
            )
            first = [f"instance-{number}" for number in range(4)]
            assert await destinations() == ["the freest", *first[1:]]
            await next_frame(
                "requests: f.requests.map((r) => r.id === id ? { ...r, instance: 'instance-2' }"
                " : r)"
            )
            others = [name for name in first if name != "instance-2"]
            assert await destinations() == ["the freest", *others]
            # A move that ends when something else is looked at is told to nobody.
            ends = asyncio.Event()

            async def move(route: Any) -> None:
                await ends.wait()
                await route.fulfill(status=409, json={"error": {"message": "Not migrated: x."}})

            await page.route("**/llumsched/migrations", move)
            async with page.expect_response("**/llumsched/migrations"):
                await page.click("#detail .act button")
                await page.evaluate("choose({ instance: 'instance-1' })")
                ends.set()
            await next_frame("")
            assert await page.inner_text("#detail .said") == ""
            assert await page.locator("#detail .act button").count() == 2
            await next_frame("instances: f.instances.filter((i) => i.id !== 'instance-1')")
            assert await page.locator("#detail .act button").count() == 0
            assert "gone" in await page.inner_text("#detail")
            # Three are there; two clicks before either has booted are two more.
            for number in (4, 5):
                await page.click("#more")
                await page.wait_for_function(
                    f"document.getElementById('wanted').textContent === '3 → {number}'", polling=20
                )
            assert asked == [4, 5]

    asyncio.run(play())
