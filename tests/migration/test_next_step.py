"""Requests that arrive, or are rolled back, are in the next step, beside whatever prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llumsched.core.migration.source.events import SourceCommand, SuspendRequest
from llumsched.core.migration.source.record import EARLY_SHARE, hand_over_s
from llumsched.engine.base import CannotMigrate, StepAhead
from llumsched.migration.source import OutgoingMigration
from tests.migration.answers import seen_by_client
from tests.migration.cases import CASES, params
from tests.migration.pool import Pool
from tests.migration.ways import ask

NUM_PROMPTS = 4
NUM_PROMPT_TOKENS = 640
# Of one step at the instance with the prompts: each of them takes many.
MAX_SCHEDULED_TOKENS = 96

NAMES = ("seed", "penalties, seed", "JSON schema")


class Steps:
    """The content of each step of an instance, and which was the first after a call of its port."""

    def __init__(
        self, pool: Pool, index: int, method: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        instance = pool.instances[index]
        self.scheduled: list[dict[str, int]] = []
        self.first: int | None = None
        schedule: Callable[..., Any] = instance.core.scheduler.schedule
        call: Callable[..., Any] = getattr(instance.port, method)

        def observed(*arguments: Any) -> Any:
            output = schedule(*arguments)
            self.scheduled.append(dict(output.num_scheduled_tokens))
            return output

        def noted(*arguments: Any) -> Any:
            self.first = len(self.scheduled)
            return call(*arguments)

        monkeypatch.setattr(instance.core.scheduler, "schedule", observed)
        monkeypatch.setattr(instance.port, method, noted)
        monkeypatch.setattr(
            instance.core.scheduler, "max_num_scheduled_tokens", MAX_SCHEDULED_TOKENS
        )

    def check(self, sequence_id: str, prompts: list[str]) -> None:
        """The request is in every step from its first on; prompts are computed meanwhile."""
        assert self.first is not None
        mine = [step for step in self.scheduled[self.first :] if any(p in step for p in prompts)]
        last = max(i for i, step in enumerate(mine) if sequence_id in step)
        assert all(step.get(sequence_id) == 1 for step in mine[: last + 1])
        assert sum(any(step.get(p, 0) > 1 for p in prompts) for step in mine[: last + 1]) >= 5


def long_prompts(pool: Pool, at: int) -> list[str]:
    """Send prompts that are computed at an instance for some time to come."""
    sequences = []
    for number in range(NUM_PROMPTS):
        prompt = [600 + (i * 31 + number * 211) % 997 for i in range(NUM_PROMPT_TOKENS)]
        answer = pool.submit(f"prompt {number}", prompt, params(max_tokens=2), at=at)
        sequences += answer.sequence_ids
    return sequences


@pytest.mark.parametrize("name", NAMES)
def test_an_arrival(
    pool: Pool, unmoved: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    steps = Steps(pool, 1, "commit", monkeypatch)
    (sequence_id,) = ask(pool, name, CASES[name])
    pool.until(lambda: pool.num_tokens(name) >= 4)
    prompts = long_prompts(pool, at=1)
    pool.step()
    assert pool.move(sequence_id, 1).outcome == "committed"
    answer, *_ = pool.finish(name, *(f"prompt {i}" for i in range(NUM_PROMPTS)))
    steps.check(sequence_id, prompts)
    assert seen_by_client(answer) == unmoved[name]


@pytest.fixture
def with_long_steps(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """Instance 1 says that its steps are long, and that one ends in a moment."""
    source, destination = pool.instances[:2]

    def step_ahead() -> StepAhead:
        needed_s = hand_over_s(source.core.step_time_s)
        step_s = 5 * needed_s
        return StepAhead(ends_in_s=needed_s + EARLY_SHARE * step_s + 0.3, step_s=step_s)

    with monkeypatch.context() as patched:
        patched.setattr(destination.core, "step_ahead", step_ahead)
        pool.configure()  # a migrator takes it when it is made
    yield pool
    pool.settle()
    pool.configure()


def test_an_arrival_as_a_long_step_ends(
    with_long_steps: Pool, unmoved: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request decodes on until then, into blocks that were reserved for it."""
    pool, name = with_long_steps, "long answer"
    waited_s: list[float] = []
    execute = OutgoingMigration.execute

    def observed(self: OutgoingMigration, command: SourceCommand) -> None:
        if isinstance(command, SuspendRequest):
            waited_s.append(command.after_s)
        execute(self, command)

    def grow(*_: Any) -> list[int]:
        raise AssertionError("there is no room")

    monkeypatch.setattr(OutgoingMigration, "execute", observed)
    monkeypatch.setattr(pool.instances[1].port, "grow", grow)
    (sequence_id,) = ask(pool, name, CASES[name])
    pool.until(lambda: pool.num_tokens(name) >= 4)
    report = pool.move(sequence_id, 1)
    assert report.outcome == "committed", report
    (answer,) = pool.finish(name)
    assert seen_by_client(answer) == unmoved[name]
    (after_s,) = waited_s
    assert after_s > 0


@pytest.mark.parametrize("name", ["penalties, seed"])
def test_a_request_that_is_rolled_back(
    pool: Pool, unmoved: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    steps = Steps(pool, 0, "resume", monkeypatch)

    def refuse(*_: Any) -> None:
        raise CannotMigrate("a test")

    monkeypatch.setattr(pool.instances[1].port, "_install", refuse)
    (sequence_id,) = ask(pool, name, CASES[name])
    pool.until(lambda: pool.num_tokens(name) >= 4)
    prompts = long_prompts(pool, at=0)
    pool.step()
    assert pool.move(sequence_id, 1).outcome == "aborted"
    answer, *_ = pool.finish(name, *(f"prompt {i}" for i in range(NUM_PROMPTS)))
    steps.check(sequence_id, prompts)
    assert seen_by_client(answer) == unmoved[name]
