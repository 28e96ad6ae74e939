"""An OTLP collector in this process: takes spans in by gRPC, and keeps them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2,
    trace_service_pb2_grpc,
)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
    """A context manager; ``spans`` are in the order of their coming."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self._server = grpc.server(ThreadPoolExecutor(1))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Collector:
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.stop(grace=None)

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The one call of the protocol."""
        for of_resource in request.resource_spans:
            for of_scope in of_resource.scope_spans:
                self.spans.extend(of_scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def of_trace(self, trace_id: str) -> dict[str, list[Any]]:
        """The spans of one trace, by name."""
        found: dict[str, list[Any]] = {}
        for span in list(self.spans):
            if span.trace_id.hex() == trace_id:
                found.setdefault(span.name, []).append(span)
        return found
