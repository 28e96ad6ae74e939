"""OpenTelemetry spans of a request: where its time went, and why it went where it did.

    llumsched.request                   from its arrival at the frontend to its end
      llm_request                       vLLM's own, with its times and numbers of tokens
      llumsched.queue                   until the scheduler has chosen an instance
      llumsched.dispatch                an event for each candidate, with its load and score
      llumsched.migration               from the order to the commit, or to its failure
        llumsched.migration.stage       blocks that were copied in one round
        llumsched.migration.suspended   neither of the two decodes
      llumsched.hand_over               from one instance's last token to the next one's first
      llumsched.resumption              the same, where the first was lost

The first is beneath the client's own span, if its ``traceparent`` names one. Provider, exporter and
sampling are vLLM's (``--otlp-traces-endpoint``, ``OTEL_TRACES_SAMPLER``).

What the scheduler did it tells when the request has ended, as it tells ``llumsched trace``; so
nothing is sent to anybody on behalf of a request that is not sampled, and no time of one that is
depends on it. A scheduler that is silent then, or was started again meanwhile, leaves its part out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import REGISTRY, CollectorRegistry
from vllm.v1.engine import EngineCoreRequest

from llumsched.frontend.routing.request_metrics import FrontendMetrics
from llumsched.frontend.routing.routes import Route
from llumsched.frontend.routing.scheduler_client import SchedulerUnavailable
from llumsched.wire.control import RequestTraced, TraceStep
from llumsched.wire.names import instance_name

# The report of a migration may be on its way still when the request ends.
SETTLE_S = 1.0
TRACE_TIMEOUT_S = 5.0
# Requests that have ended and whose steps are being asked for.
MOST_ASKED = 200
SPAN_OF_CAUSE = {"migration": "llumsched.hand_over", "resumption": "llumsched.resumption"}

_PROPAGATOR = TraceContextTextMapPropagator()

Ask = Callable[[str, float], Awaitable[RequestTraced]]


@dataclass(slots=True)
class _Pause:
    cause: str
    begun_ns: int
    ended_ns: int
    instance: int | None


@dataclass(slots=True)
class _Open:
    """A sampled request that has not ended."""

    request_id: str
    span: trace.Span
    pauses: list[_Pause] = field(default_factory=list)


class TracedMetrics(FrontendMetrics):
    """Counts of a frontend, and the spans of the requests that are sampled.

    Args:
        policy: the bundle in force.
        ask: the scheduler for the steps of a request; the second argument is a time limit in s.
        tracer: that of the provider which vLLM has set up, unless it is given.
    """

    def __init__(
        self,
        policy: str,
        ask: Ask,
        registry: CollectorRegistry = REGISTRY,
        tracer: trace.Tracer | None = None,
        settle_s: float = SETTLE_S,
    ) -> None:
        super().__init__(registry)
        self._policy = policy
        self._ask = ask
        self._given_tracer = tracer
        self._settle_s = settle_s
        self._open: dict[int, _Open] = {}
        self._finishing: set[asyncio.Task[None]] = set()

    def opened(self, route: Route, request: EngineCoreRequest) -> None:
        # vLLM sets its provider up after this object has been made.
        tracer = self._given_tracer or trace.get_tracer("llumsched")
        span = tracer.start_span(
            "llumsched.request",
            context=_PROPAGATOR.extract(request.trace_headers or {}),
            kind=trace.SpanKind.SERVER,
        )
        # Also of one that is not sampled, so that vLLM does not sample it by itself.
        headers: dict[str, str] = {}
        _PROPAGATOR.inject(headers, trace.set_span_in_context(span))
        request.trace_headers = headers or request.trace_headers
        if span.is_recording():
            self._open[id(route)] = _Open(request.request_id, span)

    def paused(self, route: Route, now_s: float) -> None:
        super().paused(route, now_s)
        open_ = self._open.get(id(route))
        if open_ is not None:
            times_ns = _wall_ns(route.last_token_s), _wall_ns(now_s)
            open_.pauses.append(_Pause(route.pause_cause, *times_ns, route.instance))

    def ended(self, route: Route, outcome: str) -> None:
        super().ended(route, outcome)
        open_ = self._open.pop(id(route), None)
        if open_ is None:
            return
        instance = route.instance
        open_.span.set_attributes(
            {
                "llumsched.request_id": open_.request_id,
                "llumsched.external_id": route.external_id,
                "llumsched.policy": self._policy,
                "llumsched.instance": "" if instance is None else instance_name(instance),
                "llumsched.outcome": outcome,
                "llumsched.num_prompt_tokens": route.num_prompt_tokens,
                "llumsched.num_output_tokens": route.num_tokens,
                "llumsched.num_migrations": route.num_moves,
                "llumsched.num_resumptions": route.num_resumptions,
            }
        )
        if outcome != "finished":
            open_.span.set_status(trace.StatusCode.ERROR, outcome)
        if len(self._finishing) >= MOST_ASKED:
            self._finish(open_, (), time.time_ns())
            return
        task = asyncio.get_running_loop().create_task(self._finish_later(open_, time.time_ns()))
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)

    async def _finish_later(self, open_: _Open, ended_ns: int) -> None:
        steps: Iterable[TraceStep] = ()
        try:
            await asyncio.sleep(self._settle_s)
            traced = await self._ask(open_.request_id, TRACE_TIMEOUT_S)
            steps = traced.requests.get(open_.request_id, ())
        except SchedulerUnavailable as error:
            open_.span.set_attribute("llumsched.scheduler", str(error))
        finally:
            self._finish(open_, steps, ended_ns)

    def _finish(self, open_: _Open, steps: Iterable[TraceStep], ended_ns: int) -> None:
        tracer = self._given_tracer or trace.get_tracer("llumsched")
        spans = _Spans(tracer, open_.span)
        for pause in open_.pauses:
            instance = "" if pause.instance is None else instance_name(pause.instance)
            spans.add(
                SPAN_OF_CAUSE[pause.cause],
                pause.begun_ns,
                pause.ended_ns,
                {"llumsched.instance": instance},
            )
        spans.of_steps(steps)
        open_.span.end(end_time=ended_ns)


class _Spans:
    """Spans beneath that of a request."""

    def __init__(self, tracer: trace.Tracer, root: trace.Span) -> None:
        self._tracer = tracer
        self._root = root
        self._beneath_root = trace.set_span_in_context(root)

    def add(
        self,
        name: str,
        begun_ns: int,
        ended_ns: int,
        attributes: dict[str, str | int | float],
        parent: trace.Span | None = None,
    ) -> trace.Span:
        """A span that is over; events and spans beneath it may still be added by its context."""
        span = self._tracer.start_span(
            name,
            context=self._beneath_root if parent is None else trace.set_span_in_context(parent),
            start_time=begun_ns,
            attributes=attributes,
        )
        span.end(end_time=max(begun_ns, ended_ns))
        return span

    def of_steps(self, steps: Iterable[TraceStep]) -> None:
        """Add what the scheduler has told."""
        arrived_ns: int | None = None
        begun: dict[str | None, TraceStep] = {}
        for step in steps:
            at_ns = int(step.at_s * 1e9)
            match step.kind:
                case "arrived":
                    arrived_ns = at_ns
                case "dispatched":
                    self._dispatched(step, at_ns, at_ns if arrived_ns is None else arrived_ns)
                case "migration begins":
                    begun[step.migration_id] = step
                case "migration ended":
                    self._migrated(step, at_ns, begun.pop(step.migration_id, None))
                case "held":
                    pass
                case _:
                    said = {"llumsched.instance": step.instance_id or "", "text": step.text}
                    self._root.add_event(f"llumsched.{step.kind}", said, timestamp=at_ns)

    def _dispatched(self, step: TraceStep, at_ns: int, arrived_ns: int) -> None:
        self.add("llumsched.queue", arrived_ns, at_ns, {})
        span = self._tracer.start_span(
            "llumsched.dispatch",
            context=self._beneath_root,
            start_time=at_ns,
            attributes={
                "llumsched.instance": step.instance_id or "",
                "llumsched.reason": step.text,
                "llumsched.scored_by": step.scored_by,
            },
        )
        for candidate in step.candidates:
            attributes: dict[str, str | int | float] = {
                "llumsched.instance": candidate.instance_id,
                "llumsched.num_free_blocks": candidate.num_free_blocks,
                "llumsched.num_total_blocks": candidate.num_total_blocks,
                "llumsched.num_running": candidate.num_running,
                "llumsched.num_waiting": candidate.num_waiting,
            }
            if candidate.score is not None:
                attributes["llumsched.score"] = candidate.score
            span.add_event("candidate", attributes, timestamp=at_ns)
        span.end(end_time=at_ns)

    def _migrated(self, step: TraceStep, ended_ns: int, begun: TraceStep | None) -> None:
        statistics = step.statistics
        took_ns = 0 if statistics is None else int(statistics.total_s * 1e9)
        order_came_ns = ended_ns - took_ns
        attributes: dict[str, str | int | float] = {
            "llumsched.migration_id": step.migration_id or "",
            "llumsched.source": step.instance_id or "",
            "llumsched.outcome": step.text,
            "llumsched.reason": "" if begun is None else begun.text,
        }
        if statistics is not None:
            attributes |= {
                "llumsched.num_blocks": statistics.num_blocks,
                "llumsched.num_bytes": statistics.num_bytes,
                "llumsched.num_tokens": statistics.num_tokens,
                "llumsched.transport": statistics.transport,
                "llumsched.suspended_s": statistics.suspended_s,
            }
        begun_ns = order_came_ns if begun is None else int(begun.at_s * 1e9)
        span = self.add("llumsched.migration", min(begun_ns, order_came_ns), ended_ns, attributes)
        if statistics is None or not statistics.stages:
            return
        for number, stage in enumerate(statistics.stages):
            stage_ns = order_came_ns + int(stage.began_s * 1e9)
            said: dict[str, str | int | float] = {
                "llumsched.stage": number,
                "llumsched.num_blocks": stage.num_blocks,
            }
            took_ns = int(stage.took_s * 1e9)
            self.add("llumsched.migration.stage", stage_ns, stage_ns + took_ns, said, span)
        # The last stage is what is left once the request stands still.
        suspended_ns = int(statistics.suspended_s * 1e9)
        self.add("llumsched.migration.suspended", stage_ns, stage_ns + suspended_ns, {}, span)


def _wall_ns(monotonic_s: float) -> int:
    """A time of ``time.monotonic`` as nanoseconds since the epoch."""
    return time.time_ns() - int((time.monotonic() - monotonic_s) * 1e9)
