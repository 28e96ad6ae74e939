"""Speculative decoding: a request that moves says what it would have said, whoever guesses for it.

Greedy answers are equal to those without a move; sampled ones have the same distribution (their
random draws depend on how many tokens were guessed at a time).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from vllm.outputs import RequestOutput
from vllm.v1.sample import rejection_sampler

from llumsched.engine.vllm.migration.speculation import Padding
from tests import runner_v2
from tests.campaigns import THOROUGH
from tests.migration.answers import seen_by_client
from tests.migration.cases import CASES, Case, params
from tests.migration.pool import Pool
from tests.migration.test_waiting import preempt
from tests.migration.ways import answers_of, ask, in_a_circle

pytestmark = pytest.mark.skipif(runner_v2.IS_ON, reason="of model runner V1")

NUM_DRAFTS = 3
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": NUM_DRAFTS,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
# A few tokens to choose from: the answer repeats itself, so that many a guess is right.
FEW = list(range(504, 510))

# Of what vLLM allows beside speculative decoding.
ALLOWED = (
    "greedy",
    "repetition penalty",
    "frequency penalty",
    "bad words",
    "stop string",
    "stop token",
    "logprobs",
    "prompt logprobs",
    "JSON schema",
    "regular expression",
    "tool call",
    "cache salt",
    "long prompt",
)
GREEDY: dict[str, Case] = {name: CASES[name] for name in ALLOWED} | {
    "repeats itself": Case(params(allowed_token_ids=FEW, max_tokens=60)),
    "repeats itself, under penalty": Case(
        params(allowed_token_ids=FEW, max_tokens=60, repetition_penalty=1.1)
    ),
    "repeats itself, after much": Case(params(allowed_token_ids=FEW, max_tokens=60), is_long=True),
}
REPEATING = [name for name in GREEDY if name.startswith("repeats")]


@contextmanager
def temperatures_written() -> Iterator[None]:
    """Let a sampled draft be accepted by its temperature: see ``_expanded``."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rejection_sampler, "expand_batch_to_tokens", _expanded)
        yield


def _expanded(
    values: torch.Tensor,
    ends: torch.Tensor,
    _num: int,
    replace_from: float = 0,
    replace_to: float = 0,
) -> torch.Tensor:
    """A temperature for each draft of a request. vLLM's for CPUs leaves them uninitialised, as it
    writes to a copy (cpu_triton_utils.py, line 391), and so accepts drafts that it must not."""
    found = values.repeat_interleave(torch.diff(ends, prepend=ends.new_zeros(1)))
    return torch.where(found == replace_from, torch.full_like(found, replace_to), found)


@pytest.fixture(scope="module")
def engines(tiny_model: str) -> Iterator[Pool]:
    with temperatures_written(), Pool(tiny_model, speculative_config=NGRAM) as pool:
        assert pool.instances[0].port.refusal is None
        yield pool


@pytest.fixture(scope="module")
def unmoved(engines: Pool) -> dict[str, Any]:
    return answers_of(engines, GREEDY)


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_in_a_circle(pool: Pool, unmoved: dict[str, Any], name: str) -> None:
    assert seen_by_client(in_a_circle(pool, name, GREEDY[name])) == unmoved[name]


def test_in_a_batch(pool: Pool, unmoved: dict[str, Any]) -> None:
    """All move past each other, those that repeat themselves with several tokens a step."""
    names = list(GREEDY)[-8:]
    sequences = [s for i, name in enumerate(names) for s in ask(pool, name, GREEDY[name], at=i % 2)]
    for num_tokens in (3, 9):
        pool.until(lambda n=num_tokens: all(pool.num_tokens(i) >= n for i in names))  # type: ignore[misc]
        here = [s for s in sequences if pool.routes.get(s) is not None]
        moves = [pool.start_move(s, 1 - pool.where(s)) for s in here]
        reports = pool.until_moved(*moves)
        assert any(report.outcome == "committed" for report in reports)
    for name, answer in zip(names, pool.finish(*names), strict=True):
        assert seen_by_client(answer) == unmoved[name], name


def preempted_before_and_after(pool: Pool, name: str) -> RequestOutput:
    """The answer to a request that is preempted, goes on, moves, and is preempted again."""
    (sequence_id,) = ask(pool, name, GREEDY[name])
    for num_tokens, index in ((4, 0), (20, 1)):
        pool.until(lambda n=num_tokens: pool.num_tokens(name) >= n)  # type: ignore[misc]
        preempt(pool, index, sequence_id)
        pool.until(lambda n=num_tokens: pool.num_tokens(name) >= n + 6)  # type: ignore[misc]
        if index == 0:
            assert pool.move(sequence_id, 1).outcome == "committed"
    (answer,) = pool.finish(name)
    return answer


@pytest.mark.parametrize("name", REPEATING)
def test_preempted_before_and_after(pool: Pool, unmoved: dict[str, Any], name: str) -> None:
    assert seen_by_client(preempted_before_and_after(pool, name)) == unmoved[name]


def test_rolled_back(pool: Pool, unmoved: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("a test")

    monkeypatch.setattr(pool.instances[1].port, "_install", refuse)
    name = "repeats itself"
    (sequence_id,) = ask(pool, name, GREEDY[name])
    pool.until(lambda: pool.num_tokens(name) >= 4)
    assert pool.move(sequence_id, 1).outcome == "aborted"
    assert seen_by_client(pool.finish(name)[0]) == unmoved[name]


# ---- what is not carried, and need not be -------------------------------------------------------


class Scheduled:
    """Drafts of each step of an instance."""

    def __init__(self, pool: Pool, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[dict[str, list[int]]] = []
        scheduler: Any = pool.instances[index].core.scheduler
        schedule = scheduler.schedule

        def noted(*arguments: Any) -> Any:
            output = schedule(*arguments)
            drafts = output.scheduled_spec_decode_tokens
            self.steps.append({i: list(drafts.get(i, ())) for i in output.num_scheduled_tokens})
            return output

        monkeypatch.setattr(scheduler, "schedule", noted)


@pytest.mark.parametrize("is_padded", [False, True])
def test_a_step_that_resumes_has_no_drafts(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, is_padded: bool
) -> None:
    """vLLM would pad it with tokens that are none, some of which its CPU kernels accept."""
    if is_padded:
        monkeypatch.setattr(Padding, "switch_off", lambda _: None)
    scheduled = Scheduled(pool, 1, monkeypatch)
    (sequence_id,) = ask(pool, "r", GREEDY["repeats itself"])
    pool.until(lambda: pool.num_tokens("r") >= 8)
    assert pool.move(sequence_id, 1).outcome == "committed"
    pool.finish("r")
    steps = [step[sequence_id] for step in scheduled.steps if sequence_id in step]
    assert (steps[0] == [-1] * NUM_DRAFTS) is is_padded
    assert steps[0] == [] or is_padded
    # Its drafter has gone on, from the tokens that it did not see being made.
    assert any(len(drafts) == NUM_DRAFTS and -1 not in drafts for drafts in steps[1:])
    assert pool.instances[1].core.scheduler.dynamic_sd_lookup is None


def test_a_suspended_request_has_no_drafts(pool: Pool) -> None:
    (sequence_id,) = ask(pool, "r", GREEDY["repeats itself"])
    request = pool.instances[0].core.scheduler.requests[sequence_id]
    pool.until(lambda: pool.num_tokens("r") >= 8 and bool(request.spec_token_ids))
    port = pool.instances[0].port
    port.start_export(sequence_id)
    assert port.suspend(sequence_id).result().final.num_computed_tokens == request.num_tokens - 1
    assert request.spec_token_ids == []
    port.resume(sequence_id)
    pool.finish("r")


# ---- sampling -----------------------------------------------------------------------------------

NUM_SAMPLES = 1600 if THOROUGH else 96
# Of chi-squared: one in ten thousand would be further off.
MAX_DEVIATIONS = 3.7


def _sampled(pool: Pool, seeds: Sequence[int], moves: bool) -> dict[int, Counter[int]]:
    """How often each token was sampled, by its place in the answer."""
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    for start in range(0, len(seeds), 12):
        names = {f"s{seed}": seed for seed in seeds[start : start + 12]}
        sequences = {}
        for name, seed in names.items():
            case = Case(params(temperature=1.5, seed=seed, allowed_token_ids=FEW, max_tokens=16))
            (sequences[name],) = ask(pool, name, case)
        if moves:
            pool.until(lambda n=tuple(names): all(pool.num_tokens(i) >= 2 for i in n))  # type: ignore[misc]
            here = [s for s in sequences.values() if pool.routes.get(s) is not None]
            pool.until_moved(*[pool.start_move(s, 1) for s in here])
        for answer in pool.finish(*names):
            for place, token_id in enumerate(answer.outputs[0].token_ids):
                counts[place][token_id] += 1
    pool.settle()
    return counts


def check_distribution(pool: Pool) -> None:
    """Of each token of the answer, over many seeds: chi-squared of two samples, of those that
    stayed and those that moved."""
    stayed = _sampled(pool, range(NUM_SAMPLES), moves=False)
    moved = _sampled(pool, range(NUM_SAMPLES, 2 * NUM_SAMPLES), moves=True)
    for place, counts in stayed.items():
        others = moved[place]
        statistic = sum(
            (counts[i] - others[i]) ** 2 / (counts[i] + others[i])
            for i in FEW
            if counts[i] + others[i]
        )
        freedom = len(FEW) - 1
        assert statistic < freedom + MAX_DEVIATIONS * (2 * freedom) ** 0.5 + 6, place


def test_sampled_with_the_same_distribution(pool: Pool) -> None:
    check_distribution(pool)
