"""Spans of a request: one tree, beneath the client's span, of what became of the request."""

from __future__ import annotations

import asyncio
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased
from prometheus_client import CollectorRegistry

from llumsched.frontend.routing.routes import Arrival, Route, Routes
from llumsched.frontend.routing.scheduler_client import SchedulerUnavailable
from llumsched.frontend.routing.tracing import TracedMetrics
from llumsched.wire.control import (
    Candidate,
    MigrationStatistics,
    RequestTraced,
    StageStatistics,
    TraceStep,
)

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENT_SPAN = "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE_ID}-{CLIENT_SPAN}-01"
NOT_SAMPLED = f"00-{TRACE_ID}-{CLIENT_SPAN}-00"


class Request:
    """The part of vLLM's request that is looked at."""

    request_id = "cmpl-1-0"

    def __init__(self, traceparent: str | None = None) -> None:
        self.trace_headers: Any = None if traceparent is None else {"traceparent": traceparent}


class Output:
    """One token."""

    finish_reason = None

    def __init__(self) -> None:
        self.request_id = "cmpl-1-0"
        self.new_token_ids = [7]


def step(at_s: float, kind: str, text: str = "", **changes: Any) -> TraceStep:
    values: dict[str, Any] = {"instance_id": None, "migration_id": None, "candidates": []}
    return TraceStep(at_s=at_s, kind=kind, text=text, **(values | changes))


STATISTICS = MigrationStatistics(
    num_stages=2,
    num_blocks=11,
    num_cached_blocks=0,
    num_bytes=1000,
    num_tokens=350,
    num_output_tokens=20,
    total_s=0.5,
    suspended_s=0.05,
    step_time_s=0.02,
    transport="tcp",
    stages=(
        StageStatistics(num_blocks=10, began_s=0.1, took_s=0.3),
        StageStatistics(num_blocks=1, began_s=0.42, took_s=0.06),
    ),
)
CANDIDATES = [
    Candidate(
        instance_id=f"instance-{number}",
        num_free_blocks=60,
        num_total_blocks=64,
        num_running=1,
        num_waiting=0,
        score=score,
    )
    for number, score in enumerate((0.25, None))
]
STEPS = [
    step(100.0, "arrived", "120 prompt tokens"),
    step(100.0, "held", "no instance takes it yet"),
    step(
        102.0,
        "dispatched",
        "expected cost 0.250 s",
        instance_id="instance-0",
        candidates=CANDIDATES,
        scored_by="expected cost in s",
    ),
    step(105.0, "migration begins", "to instance-1", instance_id="instance-0", migration_id="m1"),
    step(
        105.6,
        "migration ended",
        "committed at instance-1",
        instance_id="instance-0",
        migration_id="m1",
        statistics=STATISTICS,
    ),
    step(106.0, "lost", "its process died", instance_id="instance-1"),
    step(107.0, "finished"),
]


class Traced:
    """A frontend that counts and traces, and what it has exported."""

    def __init__(self, *, is_sampled: bool = True, steps: list[TraceStep] | None = STEPS) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=ParentBased(ALWAYS_ON if is_sampled else ALWAYS_OFF))
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._steps = steps
        self.num_asked = 0
        self.metrics = TracedMetrics(
            "adaptive",
            self._ask,
            CollectorRegistry(),
            provider.get_tracer("test"),
            settle_s=0.0,
        )
        self.routes = Routes(observer=self.metrics)

    async def _ask(self, request_id: str, timeout_s: float) -> RequestTraced:
        self.num_asked += 1
        if self._steps is None:
            raise SchedulerUnavailable("silent")
        return RequestTraced(call_id=1, requests={request_id: self._steps})

    def live(self, request: Request, *, moves: bool = False) -> Route:
        """The life of a request: its first token, perhaps a move, its end."""

        async def life() -> Route:
            route = self.routes.open("cmpl-1-0")
            self.metrics.opened(route, request)  # type: ignore[arg-type]
            route.instance = 0
            self.routes.pass_on(0, [Output()])
            if moves:
                self.routes.arrive(
                    "cmpl-1-0", Arrival(instance=1, placement_number=1, num_tokens=1)
                )
                self.routes.pass_on(1, [Output()])
                self.routes.lose(1)
                self.routes.settle(route, 2, is_announced=False)
                self.routes.pass_on(2, [Output()])
            self.metrics.ended(route, "finished")
            await asyncio.gather(*self.metrics._finishing)
            return route

        return asyncio.run(life())

    @property
    def spans(self) -> dict[str, list[ReadableSpan]]:
        found: dict[str, list[ReadableSpan]] = {}
        for span in self._exporter.get_finished_spans():
            found.setdefault(span.name, []).append(span)
        return found


def seconds(span: ReadableSpan) -> tuple[float, float]:
    assert span.start_time is not None
    assert span.end_time is not None
    return round(span.start_time / 1e9, 3), round(span.end_time / 1e9, 3)


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent is not None else None


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    span_id: int = span.context.span_id
    return span_id


def test_a_whole_life_is_one_tree_beneath_the_clients_span() -> None:
    traced = Traced()
    request = Request(SAMPLED)
    traced.live(request, moves=True)
    spans = traced.spans
    (root,) = spans["llumsched.request"]
    assert parent_of(root) == int(CLIENT_SPAN, 16)
    (migration,) = spans["llumsched.migration"]
    beneath_migration = {"llumsched.migration.stage", "llumsched.migration.suspended"}
    for name, found in spans.items():
        for span in found:
            assert span.context is not None
            assert span.context.trace_id == int(TRACE_ID, 16)
            if name != "llumsched.request":
                parent = migration if name in beneath_migration else root
                assert parent_of(span) == id_of(parent), name
    # vLLM's own span is beneath it as well, by the headers that come back from the engine.
    assert request.trace_headers["traceparent"] == f"00-{TRACE_ID}-{id_of(root):016x}-01"


def test_times_and_candidates_are_what_the_scheduler_told() -> None:
    traced = Traced()
    traced.live(Request(SAMPLED))
    spans = traced.spans
    assert seconds(spans["llumsched.queue"][0]) == (100.0, 102.0)
    (dispatch,) = spans["llumsched.dispatch"]
    assert dispatch.attributes is not None
    assert dispatch.attributes["llumsched.scored_by"] == "expected cost in s"
    told = [dict(event.attributes or {}) for event in dispatch.events]
    assert [t["llumsched.instance"] for t in told] == ["instance-0", "instance-1"]
    assert [t.get("llumsched.score") for t in told] == [0.25, None]
    assert seconds(spans["llumsched.migration"][0]) == (105.0, 105.6)
    stages = [seconds(span) for span in spans["llumsched.migration.stage"]]
    assert stages == [(105.2, 105.5), (105.52, 105.58)]
    assert seconds(spans["llumsched.migration.suspended"][0]) == (105.52, 105.57)
    (root,) = spans["llumsched.request"]
    assert [event.name for event in root.events] == ["llumsched.lost", "llumsched.finished"]


def test_what_the_client_waits_for_when_its_request_changes_its_instance() -> None:
    traced = Traced()
    traced.live(Request(), moves=True)
    assert len(traced.spans["llumsched.hand_over"]) == 1
    (resumed,) = traced.spans["llumsched.resumption"]
    assert (resumed.attributes or {})["llumsched.instance"] == "instance-2"


def test_a_request_without_a_traceparent_begins_a_trace() -> None:
    traced = Traced()
    request = Request()
    traced.live(request)
    (root,) = traced.spans["llumsched.request"]
    assert root.parent is None
    assert f"{id_of(root):016x}" in request.trace_headers["traceparent"]


def test_what_is_not_sampled_asks_nobody_and_is_not_sampled_by_vllm_either() -> None:
    of_client, of_sampler = Traced(), Traced(is_sampled=False)
    of_client.live(Request(NOT_SAMPLED), moves=True)
    request = Request()
    of_sampler.live(request, moves=True)
    for traced in (of_client, of_sampler):
        assert not traced.spans
        assert traced.num_asked == 0
    flags = int(request.trace_headers["traceparent"].rpartition("-")[2], 16)
    assert not flags & 1


def test_a_silent_scheduler_leaves_its_part_out() -> None:
    traced = Traced(steps=None)
    traced.live(Request(SAMPLED), moves=True)
    assert set(traced.spans) == {
        "llumsched.request",
        "llumsched.hand_over",
        "llumsched.resumption",
    }
    (root,) = traced.spans["llumsched.request"]
    assert (root.attributes or {})["llumsched.scheduler"] == "silent"
