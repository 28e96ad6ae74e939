"""`max_waiting_per_instance` holds in a burst: what was sent since the last report counts too."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llumsched.core.actions import Action, DispatchRequest
from tests.campaigns import examples
from tests.core.builders import BLOCK_SIZE, Driver


def dispatched(actions: Iterable[Action]) -> list[str]:
    return [a.request_id for a in actions if isinstance(a, DispatchRequest)]


@pytest.mark.parametrize("max_num_seqs", [2, 8])
def test_a_burst_does_not_exceed_what_may_wait(max_num_seqs: int) -> None:
    driver = Driver(max_waiting_per_instance=1)
    driver.join("a", "b", max_num_seqs=max_num_seqs)
    placed = sum(len(dispatched(driver.arrive(f"r{n}"))) for n in range(27))
    assert placed == 2 * max_num_seqs, "what is in the next step does not wait"


def test_prompts_longer_than_a_step_wait_for_one_another() -> None:
    driver = Driver(max_waiting_per_instance=1)
    driver.join("a", max_num_batched_tokens=2 * BLOCK_SIZE)
    placed = [dispatched(driver.arrive(f"r{n}", num_blocks=2)) for n in range(4)]
    assert placed == [["r0"], [], [], []]


def test_what_finds_no_blocks_waits() -> None:
    driver = Driver(max_waiting_per_instance=1)
    driver.join("a", max_num_batched_tokens=10_000)
    placed = [dispatched(driver.arrive(f"r{n}", num_blocks=60)) for n in range(3)]
    assert placed == [["r0"], [], []]


def test_while_nobody_reports_no_more_wait_than_may() -> None:
    driver = Driver(max_waiting_per_instance=2, stale_after_s=3.0)
    driver.join("a", "b")
    driver.now = 4.0
    placed = [len(dispatched(driver.arrive(f"r{n}"))) for n in range(6)]
    assert placed == [1, 1, 1, 1, 0, 0]


class Engine:
    """An instance that takes what it can into each step, and reports after it."""

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int, driver: Driver) -> None:
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._driver = driver
        self._unreported: list[str] = []
        self.waiting: list[str] = []
        self.running: list[str] = []

    def take(self, actions: Iterable[Action]) -> None:
        for request_id in dispatched(actions):
            self.waiting.append(request_id)
            self._unreported.append(request_id)

    def step(self) -> None:
        room = self._max_num_batched_tokens - len(self.running)
        while self.waiting and len(self.running) < self._max_num_seqs and room >= BLOCK_SIZE:
            self.running.append(self.waiting.pop(0))
            room -= BLOCK_SIZE

    def report(self, finished: Sequence[str] = ()) -> None:
        received, self._unreported = tuple(self._unreported), []
        self.take(
            self._driver.report(
                "a",
                num_used_blocks=len(self.running),
                num_running=len(self.running),
                num_waiting=len(self.waiting),
                num_waiting_blocks=len(self.waiting),
                num_waiting_tokens=BLOCK_SIZE * len(self.waiting),
                num_prefill_tokens_pending=BLOCK_SIZE * len(self.waiting),
                received_request_ids=received,
                finished_request_ids=tuple(finished),
            )
        )


@settings(max_examples=examples(50))
@given(
    limit=st.integers(1, 4),
    max_num_seqs=st.integers(1, 4),
    max_num_batched_tokens=st.sampled_from([32, 64, 512]),
    acts=st.lists(st.one_of(st.integers(1, 12), st.sampled_from(["step", "end"])), max_size=40),
)
def test_no_more_wait_after_a_step_than_may(
    limit: int, max_num_seqs: int, max_num_batched_tokens: int, acts: list[int | str]
) -> None:
    driver = Driver(max_waiting_per_instance=limit)
    driver.join("a", max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    engine = Engine(max_num_seqs, max_num_batched_tokens, driver)
    names = itertools.count()
    for act in acts:
        if isinstance(act, int):
            for _ in range(act):
                engine.take(driver.arrive(f"r{next(names)}"))
        elif act == "step":
            engine.step()
            assert len(engine.waiting) <= limit
            engine.report()
        elif engine.running:
            engine.report([engine.running.pop()])
