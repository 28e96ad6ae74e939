"""The steps of a request, as they are told to somebody who asks why."""

from __future__ import annotations

import numpy as np

from llumsched.core.actions import DispatchRequest, RejectRequest, StartMigration
from llumsched.core.events import (
    InstanceLost,
    RequestAborted,
    RequestArrived,
    RequestFinished,
    Ticked,
)
from llumsched.core.load import InstanceLoad
from llumsched.core.types import SchedulingRequest, Scores
from llumsched.scheduler.migration_worth import MigrationWorth
from llumsched.scheduler.request_history import MOST_STEPS, RequestHistory
from tests.builders import STATISTICS, migration_report

LOADS = {
    name: InstanceLoad(
        instance_id=name, sequence=1, num_total_blocks=64, num_free_blocks=free, num_running=2
    )
    for name, free in (("instance-0", 10), ("instance-1", 60))
}


def history(most_requests: int = 10) -> RequestHistory:
    seconds = iter(range(10_000))
    return RequestHistory(lambda: LOADS, lambda: 100.0 + next(seconds), most_requests)


def arrival(request_id: str = "cmpl-1-0", *, has_begun: bool = False) -> RequestArrived:
    request = SchedulingRequest(request_id=request_id, num_prompt_tokens=120)
    return RequestArrived(request=request, has_begun=has_begun)


def dispatch(instance_id: str, request_id: str = "cmpl-1-0") -> DispatchRequest:
    return DispatchRequest(request_id=request_id, instance_id=instance_id, reason="freeness=30.0")


MOVED = migration_report(
    "m7",
    request_id="cmpl-1-0",
    source="instance-1",
    destination="instance-0",
    statistics=STATISTICS,
)


def test_a_whole_life() -> None:
    told = history()
    told.handled(arrival(), ())
    told.handled(Ticked(), (dispatch("instance-1"),))
    start = StartMigration(
        migration_id="m7",
        source="instance-1",
        destination="instance-0",
        request_id="cmpl-1-0",
        reason="freeness 1.0 -> 30.0",
    )
    told.handled(Ticked(), (start,))
    told.migration_ended(MOVED)
    told.handled(InstanceLost(instance_id="instance-0", reason="its process died"), ())
    told.handled(Ticked(), (dispatch("instance-1"),))
    told.handled(RequestFinished(request_id="cmpl-1-0", num_output_tokens=33), ())
    steps = told.steps("cmpl-1")["cmpl-1-0"]
    assert [(step.kind, step.instance_id) for step in steps] == [
        ("arrived", None),
        ("held", None),
        ("dispatched", "instance-1"),
        ("migration begins", "instance-1"),
        ("migration ended", "instance-1"),
        ("lost", "instance-0"),
        ("dispatched", "instance-1"),
        ("finished", None),
    ]
    assert [step.at_s for step in steps] == [100.0 + number for number in range(8)]
    assert "3 stages, 45 blocks, 1500000 bytes" in steps[4].text
    assert "suspended for 21.0 ms" in steps[4].text
    assert steps[4].migration_id == "m7"
    assert steps[7].text == "33 output tokens"


def test_a_dispatch_tells_of_the_candidates_the_freest_first() -> None:
    told = history()
    told.handled(arrival(), (dispatch("instance-1"),))
    arrived, dispatched = told.steps("cmpl-1-0")["cmpl-1-0"]
    assert not arrived.candidates
    assert dispatched.text == "freeness=30.0"
    assert [(c.instance_id, c.num_free_blocks) for c in dispatched.candidates] == [
        ("instance-1", 60),
        ("instance-0", 10),
    ]


def test_a_dispatch_tells_by_what_the_policy_compared_the_chosen_one_first() -> None:
    told = history()
    scores = Scores("expected cost in s", ("instance-0", "instance-1"), np.array([0.2, np.inf]))
    told.handled(arrival(), (dispatch("instance-0"),), {"cmpl-1-0": scores})
    dispatched = told.steps("cmpl-1-0")["cmpl-1-0"][1]
    assert dispatched.scored_by == "expected cost in s"
    assert [(c.instance_id, c.score) for c in dispatched.candidates] == [
        ("instance-0", 0.2),
        ("instance-1", None),
    ]


def test_what_a_migration_won_is_a_step() -> None:
    told = history()
    told.handled(arrival(), (dispatch("instance-1"),))
    told.migration_won(
        MigrationWorth(
            migration_id="m7",
            request_id="cmpl-1-0",
            source="instance-1",
            won_s=1.5,
            expected_s=2.0,
        )
    )
    won = told.steps("cmpl-1-0")["cmpl-1-0"][-1]
    assert (won.kind, won.migration_id) == ("migration won", "m7")
    assert "for 1.50 s, expected were 2.00 s" in won.text


def test_a_rejection_is_the_end() -> None:
    told = history()
    told.handled(arrival(), (RejectRequest(request_id="cmpl-1-0", reason="queue full"),))
    assert [(s.kind, s.text) for s in told.steps("cmpl-1-0")["cmpl-1-0"]][1:] == [
        ("rejected", "queue full")
    ]


def test_what_is_told_twice_is_one_step() -> None:
    told = history()
    told.handled(arrival(), (dispatch("instance-1"),))
    told.handled(arrival(), ())
    for _ in range(2):
        told.handled(RequestAborted(request_id="cmpl-1-0"), ())
    kinds = [step.kind for step in told.steps("cmpl-1-0")["cmpl-1-0"]]
    assert kinds == ["arrived", "dispatched", "aborted"]


def test_sequences_of_an_id_are_told_apart_and_ids_that_begin_alike_are_others() -> None:
    told = history()
    for request_id in ("cmpl-1-0", "cmpl-1-1", "cmpl-10-0"):
        told.handled(arrival(request_id), (dispatch("instance-1", request_id),))
    assert sorted(told.steps("cmpl-1")) == ["cmpl-1-0", "cmpl-1-1"]
    assert not told.steps("cmpl-2")


def test_what_is_kept_is_bounded() -> None:
    told = history(most_requests=3)
    for number in range(10):
        told.handled(arrival(f"r{number}"), (dispatch("instance-1", f"r{number}"),))
    assert [bool(told.steps(f"r{number}")) for number in range(10)] == [False] * 7 + [True] * 3
    for _ in range(2 * MOST_STEPS):
        told.handled(Ticked(), (dispatch("instance-0", "r9"),))
    steps = told.steps("r9")["r9"]
    assert len(steps) == MOST_STEPS
    assert steps[0].kind == "arrived"
