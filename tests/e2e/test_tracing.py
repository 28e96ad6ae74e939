"""Spans of a real pool, at a collector: ours and vLLM's are one tree beneath the client's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from tests.e2e.client import Admin, Answer
from tests.e2e.collector import Collector
from tests.e2e.servers import llumsched

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


def test_a_moved_request_is_one_tree(model: str, tmp_path: Path) -> None:
    with Collector() as collector:
        server = llumsched(
            model,
            tmp_path,
            "--instances=2",
            "--policy=latency",
            f"--otlp-traces-endpoint={collector.endpoint}",
            name="traced",
            OTEL_BSP_SCHEDULE_DELAY="200",
        )
        try:
            server.await_health()
            moved = _stream_and_move(server.url, model)
            server.await_that(
                lambda: set(collector.of_trace(TRACE_ID)) >= WANTED,
                f"spans, of which there are {sorted(collector.of_trace(TRACE_ID))}",
            )
        finally:
            ending = server.end()
        assert not ending.left
        spans = collector.of_trace(TRACE_ID)
    (root,) = spans["llumsched.request"]
    assert root.parent_span_id.hex() == CLIENT_SPAN
    assert spans["llm_request"][0].parent_span_id == root.span_id
    (migration,) = spans["llumsched.migration"]
    assert migration.parent_span_id == root.span_id
    assert len(spans["llumsched.migration.stage"]) == moved["num_stages"]
    for stage in spans["llumsched.migration.stage"]:
        assert stage.parent_span_id == migration.span_id
        assert migration.start_time_unix_nano <= stage.start_time_unix_nano
        assert stage.end_time_unix_nano <= migration.end_time_unix_nano
    (dispatch,) = spans["llumsched.dispatch"]
    told = [{a.key: a.value for a in event.attributes} for event in dispatch.events]
    assert {t["llumsched.instance"].string_value for t in told} == {"instance-0", "instance-1"}
    assert all("llumsched.num_free_blocks" in t for t in told)


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
