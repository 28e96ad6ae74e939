"""Priorities as vLLM and a header give them."""

from __future__ import annotations

import pytest

from llumsched.core.types import PriorityClass, num_blocks_for, priority_class


@pytest.mark.parametrize(("given", "expected"), [(-1, 1), (-100, 1), (0, 0), (5, 0)])
def test_a_lower_number_is_a_higher_priority_as_in_vllm(given: int, expected: int) -> None:
    assert priority_class(given) == expected


def test_a_header_names_the_class() -> None:
    assert PriorityClass.parse(" High ") is PriorityClass.HIGH
    with pytest.raises(ValueError, match="unknown priority 'urgent'; there are: normal, high"):
        PriorityClass.parse("urgent")


def test_blocks_are_counted_whole() -> None:
    assert [num_blocks_for(n, 16) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
