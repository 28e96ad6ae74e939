"""A real pool's signs to an operator: spans at a collector, a trace, and the screen of a terminal.

Ours and vLLM's spans are one tree beneath the client's.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from llumsched import cli
from llumsched.commands._admin import AdminClient
from tests.e2e.client import Admin, Answer
from tests.e2e.collector import Collector
from tests.e2e.servers import Server

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENT_SPAN = "00f067aa0ba902b7"
WANTED = {
    "llumsched.request",
    "llumsched.queue",
    "llumsched.dispatch",
    "llumsched.migration",
    "llumsched.migration.stage",
    "llumsched.migration.suspended",
    "llumsched.hand_over",
    "llm_request",
}
SCREEN_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """A pool in which one request has moved, and what the move was reported as."""

    server: Server
    collector: Collector
    report: dict[str, Any]


@pytest.fixture(scope="module")
def moved(unusual_server: Server, collector: Collector, model: str) -> Moved:
    report = _stream_and_move(unusual_server.url, model)
    return Moved(server=unusual_server, collector=collector, report=report)


def test_the_spans_are_one_tree(moved: Moved) -> None:
    collector = moved.collector
    moved.server.await_that(
        lambda: set(collector.of_trace(TRACE_ID)) >= WANTED,
        f"spans; there are {sorted(collector.of_trace(TRACE_ID))}",
    )
    spans = collector.of_trace(TRACE_ID)
    (root,) = spans["llumsched.request"]
    assert root.parent_span_id.hex() == CLIENT_SPAN
    assert spans["llm_request"][0].parent_span_id == root.span_id
    (migration,) = spans["llumsched.migration"]
    assert migration.parent_span_id == root.span_id
    assert len(spans["llumsched.migration.stage"]) == moved.report["num_stages"]
    for stage in spans["llumsched.migration.stage"]:
        assert stage.parent_span_id == migration.span_id
        assert migration.start_time_unix_nano <= stage.start_time_unix_nano
        assert stage.end_time_unix_nano <= migration.end_time_unix_nano
    (dispatch,) = spans["llumsched.dispatch"]
    told = [{a.key: a.value for a in event.attributes} for event in dispatch.events]
    assert {t["llumsched.instance"].string_value for t in told} == {"instance-0", "instance-1"}
    assert all("llumsched.num_free_blocks" in t for t in told)


def test_the_trace_has_candidates_and_stages(
    moved: Moved, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["trace", moved.report["request_id"], "--url", moved.server.url]) == 0
    printed = capsys.readouterr().out
    assert printed.count("blocks free, ") == 2
    assert f"stage {moved.report['num_stages']}: " in printed
    assert "finished: 80 output tokens" in printed


def test_the_screen_shows_both_instances(moved: Moved) -> None:
    pytest.importorskip("textual")
    from llumsched.commands._top_app import TopApp

    async def look() -> None:
        app = TopApp(AdminClient(moved.server.url))
        async with asyncio.timeout(SCREEN_TIMEOUT_S), app.run_test(size=(120, 40)) as pilot:
            while app.instances.row_count < 2:
                await pilot.pause(0.05)
            names = [str(app.instances.get_row_at(number)[0]) for number in range(2)]
            assert names == ["instance-0", "instance-1"]

    asyncio.run(look())


def _stream_and_move(url: str, model: str) -> dict[str, Any]:
    """Stream an answer with the client's span, move it once; the report of the move."""
    body = {
        "model": model,
        "prompt": [504 + i % 997 for i in range(300)],
        "max_tokens": 80,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    headers = {"traceparent": f"00-{TRACE_ID}-{CLIENT_SPAN}-01"}
    reports: list[Answer] = []
    admin = Admin(url, model)
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=body, headers=headers, timeout=120.0
    ) as answer:
        num_chunks = 0
        for line in answer.iter_lines():
            num_chunks += line.startswith("data: {")
            if num_chunks == 5 and not reports:
                (request,) = admin.requests()
                reports.append(admin.migrate(request["request_id"]))
    admin.close()
    assert [report.status for report in reports] == [200], reports
    report: dict[str, Any] = reports[0].body
    return report
