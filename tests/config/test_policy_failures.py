"""Failures of policies as their author sees them: each once, with the line that raised."""

from __future__ import annotations

from typing import Any

from llumsched.core.actions import PolicyFailed
from llumsched.core.codec import decode_action, encode
from llumsched.core.scheduling.answer_checks import MOST_FRAMES, policy_failed
from llumsched.policy_failures import MOST_KINDS, PolicyFailures, traceback_of


class Broken:
    def dispatch(self, depth: int = 0) -> Any:
        if depth:
            return self.dispatch(depth - 1)
        raise KeyError("typo")


def failure(depth: int = 0) -> PolicyFailed:
    policy = Broken()
    try:
        policy.dispatch(depth)
    except Exception as error:
        return policy_failed(policy, error)
    raise AssertionError


def test_the_traceback_shows_the_line_that_raised_and_nothing_of_ours() -> None:
    text = traceback_of(failure())
    assert text.startswith("Traceback (most recent call last):\n")
    assert text.endswith("KeyError: 'typo'")
    assert 'raise KeyError("typo")' in text
    assert text.count("  File ") == 1


def test_an_endless_recursion_keeps_the_innermost_frames() -> None:
    failed = failure(depth=100)
    assert len(failed.frames) == MOST_FRAMES
    assert 'raise KeyError("typo")' in traceback_of(failed)


def test_a_failure_read_from_a_log_of_another_machine_is_the_same() -> None:
    failed = failure()
    assert decode_action(encode(failed)) == failed
    elsewhere = PolicyFailed(policy=failed.policy, error=failed.error, frames=(("x.py", 1, "f"),))
    assert elsewhere == failed


def test_each_kind_is_new_once_and_all_are_counted() -> None:
    failures = PolicyFailures()
    assert [failures.add(failure()) is not None for _ in range(3)] == [True, False, False]
    wrong = PolicyFailed(policy="Broken", error="chose unknown instance 'x'")
    assert failures.add(wrong) is not None
    assert failures.total == 4
    assert [kind.count for kind in failures] == [3, 1]
    raised, answered = (kind.sentence() for kind in failures)
    assert raised.startswith("policy Broken failed: KeyError: 'typo' (")
    assert raised.endswith(", in dispatch)")
    assert answered == "policy Broken failed: chose unknown instance 'x'"
    assert traceback_of(wrong) == ""


def test_a_policy_with_a_number_in_each_error_does_not_grow_the_list_for_ever() -> None:
    failures = PolicyFailures()
    for number in range(3 * MOST_KINDS):
        failures.add(PolicyFailed(policy="Broken", error=f"chose unknown instance {number}"))
    assert len(list(failures)) <= MOST_KINDS + 1
    assert failures.total == 3 * MOST_KINDS == sum(kind.count for kind in failures)
