"""Moving a request with part of what it takes along replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from vllm.v1.engine import EngineCoreRequest

from llumsched.engine.base import RequestState
from llumsched.engine.vllm.migration import exports, state
from llumsched.engine.vllm.migration.state import decode_request, encode_request
from tests.migration.answers import seen_by_client
from tests.migration.cases import Case
from tests.migration.pool import Pool
from tests.migration.ways import ask

AT = 6


def moved(pool: Pool, name: str, case: Case, at: int = AT) -> Any:
    """A case's answer, moved once, after ``at`` tokens, or what kept it from being answered."""
    sequences = ask(pool, name, case)
    pool.until(lambda: pool.num_tokens(name) >= at)
    for sequence_id in sequences:
        report = pool.move(sequence_id, 1)
        if report.outcome != "committed":
            pool.finish(name)
            return report.reason
    return seen_by_client(pool.finish(name)[0])


def capturing(monkeypatch: pytest.MonkeyPatch, change: Callable[[EngineCoreRequest], None]) -> None:
    """Let the source send another request than it has."""
    real = state.capture_request

    def changed(*arguments: Any, **keywords: Any) -> RequestState:
        captured = real(*arguments, **keywords)
        request = decode_request(captured)
        change(request)
        return msgspec.structs.replace(captured, request=encode_request(request))

    monkeypatch.setattr(exports, "capture_request", changed)
