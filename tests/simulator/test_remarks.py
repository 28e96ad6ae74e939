"""Remarks on runs: one remark for all it holds of, the gravest first."""

from __future__ import annotations

import numpy as np

from llumsched.core.actions import PolicyFailed
from llumsched.policy_failures import Failure
from llumsched.simulator.results.comparison import Run, reduce_run
from llumsched.simulator.results.records import Timeline
from llumsched.simulator.results.remarks import remarks, verdict, warnings_of
from tests.simulator.results import NAN, make_result


def make_run(label: str, **changed: object) -> Run:
    return reduce_run(make_result(**changed), label=label, seed=0, slo=None, draw=False)


def test_what_holds_for_every_policy_is_said_once() -> None:
    runs = [make_run("a"), make_run("b")]
    assert sum("1 rejected: the queue is full" in remark for remark in remarks(runs)) == 1
    assert remarks(runs)[0] == "every policy: 1 rejected: the queue is full"


def test_what_every_run_is_warned_of_is_said_once() -> None:
    runs = [make_run(label, warnings=("NOT MEASURED",), is_complete=True) for label in "ab"]
    assert warnings_of(runs) == ["every policy: NOT MEASURED"]


def test_a_failure_comes_first_and_names_the_policy() -> None:
    failed = Failure(first=PolicyFailed(policy="Mine", error="answered 3, not Placement"), count=7)
    runs = [make_run("a"), make_run("b", policy_failures=(failed,))]
    assert remarks(runs)[0].startswith("b: 7 x policy Mine failed: answered 3, not Placement; ")


def test_the_verdict_goes_by_who_waits_and_how_full_the_cache_is() -> None:
    waits = make_run("a", scheduled_s=np.array([1.5, 1.0, NAN, 3.5])).summary
    assert verdict(waits).startswith("full at times: one request in a hundred waits more than 1.4")
    long = {"scheduled_s": np.array([2.5, 4.0, NAN, 3.5]),
            "first_token_s": np.array([2.6, 4.5, NAN, 4.0]),
            "finished_s": np.array([3.0, 4.5, NAN, NAN])}  # fmt: skip
    assert verdict(make_run("a", **long).summary).startswith("saturated: half of the requests")
    at_once = {"scheduled_s": np.array([0.0, 1.0, NAN, 3.5])}
    assert verdict(make_run("a", **at_once).summary).startswith("neither full nor idle")
    empty = Timeline(
        time_s=np.array([0.0, 0.0]),
        instance=np.array([0, 1]),
        num_used_blocks=np.array([1, 2]),
        num_reserved_blocks=np.array([0, 0]),
        num_free_blocks=np.array([99, 98]),
        num_running=np.array([1, 1]),
        num_waiting=np.array([0, 0]),
    )
    assert verdict(make_run("a", timeline=empty, **at_once).summary).startswith("nearly idle")
    nothing = make_run("a", status=np.zeros(4, dtype=np.int64)).summary
    assert verdict(nothing) == "nothing finished"


def test_a_pool_that_makes_answers_stand_still_is_not_called_neither_full_nor_idle() -> None:
    """Nobody waits for an engine at first; those that are preempted wait in the middle."""
    stalls = {
        "scheduled_s": np.array([0.0, 1.0, NAN, 3.5]),
        "itl_max_s": np.array([9.0, 12.0, NAN, NAN]),
        "num_preemptions": np.array([3, 4, 0, 0]),
    }
    said = verdict(make_run("a", **stalls).summary)
    assert said.startswith("full on some instance at times: 7 preemptions, and one request in a")
    assert "stands still for more than 9.00 s" in said
