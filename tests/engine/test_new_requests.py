"""Arrivals that an engine does not take as new requests: refused, and nothing is held."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from llumsched.engine.base import CannotMigrate, Refusal
from llumsched.engine.vllm.migration.imports import DestinationAdapter


def adapter(preprocess: Callable[[Any], Any], **engine: Any) -> DestinationAdapter:
    made: Any = DestinationAdapter.__new__(DestinationAdapter)
    made._engine = SimpleNamespace(preprocess_add_request=preprocess, **engine)
    found: DestinationAdapter = made
    return found


def raising(error: Exception) -> Callable[[Any], Any]:
    def preprocess(_: Any) -> Any:
        raise error

    return preprocess


def test_a_request_is_made_as_the_engine_does() -> None:
    request: Any = object()
    assert adapter(lambda asked: (asked, 0))._new_request(request) is request


def test_a_paused_engine_takes_no_arrivals() -> None:
    with pytest.raises(CannotMigrate, match="the destination is paused"):
        adapter(lambda asked: (asked, 0), reject_new_requests=True)._new_request(object())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error",
    [
        VLLMValidationError("Structured output processing only supports one backend per engine."),
        ValueError("Unsupported structured output backend: outlines"),
    ],
)
def test_a_grammar_of_another_backend_is_refused(error: Exception) -> None:
    with pytest.raises(CannotMigrate, match="the destination's engine does not take it") as refused:
        adapter(raising(error))._new_request(object())  # type: ignore[arg-type]
    assert refused.value.refusal == Refusal.INCOMPATIBLE
    assert not refused.value.refusal.is_permanent
