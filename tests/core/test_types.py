"""Priorities as vLLM and a header give them; requests that learn their predicted length."""

from __future__ import annotations

import msgspec
import pytest

from llumsched.core.types import (
    PriorityClass,
    SchedulingRequest,
    num_blocks_for,
    priority_class,
    vllm_priority,
)


@pytest.mark.parametrize(("given", "expected"), [(-1, 1), (-100, 1), (0, 0), (5, -1)])
def test_a_lower_number_is_a_higher_priority_as_in_vllm(given: int, expected: int) -> None:
    assert priority_class(given) == expected


@pytest.mark.parametrize("priority", PriorityClass)
def test_a_class_is_still_the_same_once_vllm_has_had_it(priority: PriorityClass) -> None:
    assert priority_class(vllm_priority(priority)) is priority


def test_a_header_names_the_class() -> None:
    assert PriorityClass.parse(" High ") is PriorityClass.HIGH
    with pytest.raises(ValueError, match="unknown priority 'urgent'; there are: low, normal, high"):
        PriorityClass.parse("urgent")


def test_blocks_are_counted_whole() -> None:
    assert [num_blocks_for(n, 16) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_a_prediction_changes_nothing_else() -> None:
    request = SchedulingRequest(
        request_id="r", num_prompt_tokens=9, client_id="c", prefix_hashes=(1, 2), ttft_slo_s=1.0
    )
    predicted = request.with_prediction(7)
    assert predicted == msgspec.structs.replace(request, predicted_output_tokens=7)
    assert request.predicted_output_tokens is None
